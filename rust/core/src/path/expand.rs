//! Expansion of patterns against the modules of a model.

use std::collections::BTreeMap;

use super::nearest::nearest;
use super::parse::is_segment;
use super::print::module_name;
use super::tree::{Id, Tree};
use super::{Element, FindError, Path, Step};

/// The modules of a model, by name.
///
/// Modules whose name the grammar cannot write (with white space, brackets or `@` in it) are left
/// out: no path leads to them.
#[derive(Debug)]
pub struct ModuleTree {
    tree: Tree,
    exists: Vec<bool>, // by node: whether it was listed, or is only above one that was
}

impl ModuleTree {
    /// Makes the tree of names as `named_modules()` prints them: "" is the model itself.
    pub fn new<Name: AsRef<str>>(names: impl IntoIterator<Item = Name>) -> Self {
        let mut tree = Tree::new();
        let mut exists = Vec::new();
        for name in names {
            let name = name.as_ref();
            if !name.is_empty() && !name.split('.').all(is_segment) {
                continue;
            }
            let segments = name.split('.').filter(|segment| !segment.is_empty());
            let node = tree.add(segments.map(|segment| Element::of_segment(segment).into()));
            exists.resize(tree.nodes().len(), false);
            if let Some(exists) = exists.get_mut(node) {
                *exists = true;
            }
        }
        Self { tree, exists }
    }

    /// Returns the concrete paths that a path stands for, in structural order, each once, written
    /// from the root.
    ///
    /// The path is read from the root first; where that finds no module, as the module's own name,
    /// so that `model.layers[2].output` finds the `layers` in a model's child called `model`.
    ///
    /// # Examples
    /// ```
    /// use lamina_core::path::ModuleTree;
    ///
    /// let tree = ModuleTree::new(["", "h", "h.0", "h.1", "h.2"]);
    /// let paths = tree.expand(&"model.h[::2].output[-1]".parse()?)?;
    /// let texts: Vec<_> = paths.iter().map(ToString::to_string).collect();
    /// assert_eq!(texts, ["model.h[0].output[-1]", "model.h[2].output[-1]"]);
    /// # Ok::<(), lamina_core::path::FindError>(())
    /// ```
    ///
    /// # Errors
    /// [`FindError::Unknown`] with the nearest names that exist, [`FindError::Index`] and
    /// [`FindError::Slice`] with what the container has.
    pub fn expand(&self, path: &Path) -> Result<Vec<Path>, FindError> {
        let unknown = |path: &Path| FindError::Unknown {
            path: path.boxed(),
            nearest: nearest(&self.tree, path, |node| self.listed(node).then_some(path)),
        };
        let nodes = self.tree.find(path, |node| self.listed(node), unknown)?;
        let mut paths: Vec<Path> =
            nodes.into_iter().map(|node| path.with_steps(self.tree.steps(node))).collect();
        paths.sort_unstable();
        Ok(paths)
    }

    /// Returns the length of every container on the way to these sites, by the container's name:
    /// what a [`SiteIndex`](super::SiteIndex) needs to count from the end as the model does.
    pub fn lengths<'paths>(
        &self,
        sites: impl IntoIterator<Item = &'paths Path>,
    ) -> BTreeMap<String, u64> {
        let mut lengths = BTreeMap::new();
        for site in sites {
            for (depth, step) in site.steps().iter().enumerate() {
                let container = site.steps().get(..depth).unwrap_or_default();
                if matches!(step, Step::Select(_))
                    && let Some(node) = self.tree.node(container)
                {
                    lengths.insert(module_name(container), self.tree.length(node));
                }
            }
        }
        lengths
    }

    fn listed(&self, node: Id) -> bool {
        self.exists.get(node).copied().unwrap_or(false)
    }
}
