//! Lookup of paths among recorded sites.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use xxhash_rust::xxh3::xxh3_64;

use super::nearest::nearest;
use super::tree::{Id, Tree};
use super::{Call, Element, FindError, Path, Selector};

/// A site that a path stands for: its place in the store's order, and the position asked for.
pub type Match = (usize, Option<Selector>);

/// How many of a port's recorded elements an error shows.
const ELEMENTS_SHOWN: usize = 4;

/// The sites of a store, by path.
///
/// Making it parses nothing, and finding a path to one site hashes its text: so a store of ten
/// thousand sites opens at once. The first pattern, or the first miss, parses all of them, once.
#[derive(Debug)]
pub struct SiteIndex {
    texts: String,
    ends: Vec<usize>,
    lengths: BTreeMap<String, u64>,
    by_hash: OnceLock<Vec<(u64, usize)>>,
    parsed: OnceLock<Parsed>,
}

/// The sites as a tree; those that are no concrete path are left out.
#[derive(Debug)]
struct Parsed {
    tree: Tree,
    at: Vec<Vec<(usize, Path)>>, // by node: the sites of that module
}

impl SiteIndex {
    /// Makes the index of canonical texts, in the store's order.
    ///
    /// `lengths` tells how long the model's containers are, by their name in `named_modules()`:
    /// [`ModuleTree::lengths`](super::ModuleTree::lengths). A container that it does not name ends
    /// with the highest number recorded.
    pub fn new<Text: AsRef<str>>(
        sites: impl IntoIterator<Item = Text>,
        lengths: BTreeMap<String, u64>,
    ) -> Self {
        let mut texts = String::new();
        let mut ends = Vec::new();
        for site in sites {
            texts.push_str(site.as_ref());
            ends.push(texts.len());
        }
        Self { texts, ends, lengths, by_hash: OnceLock::new(), parsed: OnceLock::new() }
    }

    /// Returns the sites that a path stands for, in the store's order, each with the position.
    ///
    /// The path is read from the root first; where that finds no site, as the modules' own names.
    /// What the brackets after the port mean is decided by what was recorded, port by port: the
    /// longest recorded element wins, the rest is the position.
    ///
    /// # Examples
    /// ```
    /// use lamina_core::path::{Selector, SiteIndex};
    ///
    /// let index = SiteIndex::new(["model.model.norm.output"], [].into());
    /// let found = index.find("model.norm.output[-1]")?;
    /// assert_eq!(found, [(0, Some(Selector::Index(-1)))]);
    /// # Ok::<(), lamina_core::path::FindError>(())
    /// ```
    ///
    /// # Errors
    /// Every [`FindError`].
    pub fn find(&self, text: &str) -> Result<Vec<Match>, FindError> {
        if let Some(site) = self.exact(text) {
            return Ok(vec![(site, None)]);
        }
        let path: Path = text.parse()?;
        if let Some(found) = self.find_one(&path) {
            return Ok(vec![found]);
        }
        let parsed = self.parsed.get_or_init(|| self.parse());
        let accept = |node| !parsed.matches(node, &path).is_empty();
        let nodes = parsed.tree.find(&path, accept, |path| parsed.unknown(path))?;
        let mut found: Vec<Match> =
            nodes.into_iter().flat_map(|node| parsed.matches(node, &path)).collect();
        found.sort_unstable_by_key(|(site, _)| *site);
        Ok(found)
    }

    /// Returns the site of a path to one module, by its text alone: with all brackets, then with
    /// the last as position, from the root and then as the module's own name.
    fn find_one(&self, path: &Path) -> Option<Match> {
        if !path.is_concrete() {
            return None;
        }
        let whole = path.position.is_none().then(|| (path.clone(), None));
        let written = path.elements.len();
        let last = usize::from(path.position.is_none());
        let parts = written.checked_sub(last).and_then(|elements| path.split(elements).ok());
        let readings: Vec<_> = whole.into_iter().chain(parts).collect();
        let find = |root: &str| {
            readings.iter().find_map(|(site, position)| {
                Some((self.exact(&format!("{root}{site}"))?, position.clone()))
            })
        };
        find("").or_else(|| find("model."))
    }

    /// Returns the site with exactly this text.
    fn exact(&self, text: &str) -> Option<usize> {
        let hash = xxh3_64(text.as_bytes());
        let by_hash = self.by_hash.get_or_init(|| self.hash());
        let first = by_hash.partition_point(|(other, _)| *other < hash);
        let mut equal = by_hash.iter().skip(first).take_while(|(other, _)| *other == hash);
        equal.find(|(_, site)| self.text(*site) == Some(text)).map(|(_, site)| *site)
    }

    fn hash(&self) -> Vec<(u64, usize)> {
        let mut by_hash: Vec<_> =
            self.texts().map(|(site, text)| (xxh3_64(text.as_bytes()), site)).collect();
        by_hash.sort_unstable();
        by_hash
    }

    fn parse(&self) -> Parsed {
        let mut tree = Tree::new();
        let mut at: Vec<Vec<(usize, Path)>> = Vec::new();
        for (site, text) in self.texts() {
            let is_site = |path: &Path| path.is_concrete() && path.position.is_none();
            let Some(path) = text.parse().ok().filter(is_site) else {
                continue;
            };
            let node = tree.add(path.steps().iter().cloned());
            at.resize_with(tree.nodes().len(), Vec::new);
            if let Some(sites) = at.get_mut(node) {
                sites.push((site, path));
            }
        }
        for (name, length) in &self.lengths {
            let segments = name.split('.').filter(|segment| !segment.is_empty());
            let steps: Vec<_> = segments.map(|name| Element::of_segment(name).into()).collect();
            tree.set_length(&steps, *length);
        }
        Parsed { tree, at }
    }

    fn texts(&self) -> impl Iterator<Item = (usize, &str)> {
        (0..self.ends.len()).filter_map(|site| Some((site, self.text(site)?)))
    }

    fn text(&self, site: usize) -> Option<&str> {
        let start = site.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied());
        self.texts.get(start?..*self.ends.get(site)?)
    }
}

impl Parsed {
    /// Returns the sites of a module that a path's port, call and elements stand for.
    fn matches(&self, node: Id, path: &Path) -> Vec<Match> {
        let sites = self.at.get(node).map(Vec::as_slice).unwrap_or_default();
        let of_port = sites.iter().filter(|(_, site)| {
            site.port == path.port && site.grad == path.grad && path.call.covers(site.call)
        });
        let mut found: Vec<(Call, usize, Match)> = Vec::new();
        for (place, site) in of_port {
            let Some(position) = position(path, &site.elements) else {
                continue;
            };
            let elements = site.elements.len();
            match found.iter_mut().find(|(call, ..)| *call == site.call) {
                Some(shorter) if shorter.1 < elements => {
                    *shorter = (site.call, elements, (*place, position));
                }
                Some(_) => {}
                None => found.push((site.call, elements, (*place, position))),
            }
        }
        found.into_iter().map(|(.., found)| found).collect()
    }

    /// Returns the error for a path that leads to no site.
    fn unknown(&self, path: &Path) -> FindError {
        let sites =
            |node| self.at.get(node).into_iter().flatten().map(|(_, site): &(usize, Path)| site);
        let of_port = |node| {
            let same = |site: &&Path| site.port == path.port && site.grad == path.grad;
            let longer = |site: &&Path| !site.elements.is_empty() && same(site);
            sites(node).filter(longer).collect::<Vec<_>>()
        };
        let here = self.tree.find(
            path,
            |node| !of_port(node).is_empty(),
            |path| FindError::Unknown { path: path.boxed(), nearest: Vec::new() },
        );
        if let Ok(nodes) = here {
            let elements = nodes.into_iter().flat_map(of_port).map(ToString::to_string);
            let elements = elements.take(ELEMENTS_SHOWN).collect();
            return FindError::Element { path: path.boxed(), elements };
        }
        FindError::Unknown { path: path.boxed(), nearest: nearest(&self.tree, path, sites) }
    }
}

impl Call {
    /// Returns whether a recorded call is among these.
    fn covers(self, recorded: Self) -> bool {
        match (self, recorded) {
            (Self::Range { start, stop }, Self::One(call)) => {
                call >= start && stop.is_none_or(|stop| call < stop)
            }
            _ => self == recorded,
        }
    }
}

/// Returns the position that a path has left when its port's element is a recorded one, or none
/// where it does not name that element.
#[expect(clippy::option_option, reason = "no match, or a match without a position")]
fn position(path: &Path, recorded: &[Element]) -> Option<Option<Selector>> {
    let rest = path.elements.strip_prefix(recorded)?;
    match (rest, &path.position) {
        ([], position) => Some(position.clone()),
        ([Element::Index(index)], None) if !path.grad => Some(Some(Selector::Index(*index))),
        _ => None,
    }
}
