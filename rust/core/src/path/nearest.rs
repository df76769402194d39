//! Which names are nearest to a path that leads nowhere.
//!
//! Paths are compared step by step: a step left out, one too many, another number, another name,
//! names by the share of letters that differ. So `model.h[2].output` is near to
//! `model.transformer.h[2].output`, and a suggested pattern stays a pattern.

use super::tree::{Id, Tree};
use super::{Path, Selector, Step};

/// What a difference costs. Only their proportions matter.
const LEFT_OUT: u32 = 4;
const TOO_MANY: u32 = 5;
const NUMBER_TOO_MANY: u32 = 9;
const OTHER_NUMBER: u32 = 3;
const OTHER_NAME: u32 = 12;
const PART_OF_NAME: u32 = 4;
const OTHER_PORT: u32 = 2;

/// How much worse than the best a suggestion may be.
const SLACK: u32 = 3;

/// How many suggestions are made.
const SUGGESTIONS: usize = 3;

/// The shortest name that is near to every name it is a part of, as `attn` is of `self_attn`.
const MIN_PART_BYTES: usize = 3;

/// Comparing is bounded: longer paths, longer names and larger products get no suggestion.
const MAX_STEPS: usize = 32;
const MAX_NAME_BYTES: usize = 64;
const MAX_CELLS: usize = 2_000_000;

/// Suggestions longer than this help nobody.
const MAX_TEXT: usize = 256;

/// Returns the texts of what is nearest to a path, best first. `sites` gives what there is at a
/// node, as paths of which the part after the modules counts.
pub(super) fn nearest<'sites, Sites>(
    tree: &Tree,
    path: &Path,
    sites: impl Fn(Id) -> Sites,
) -> Vec<String>
where
    Sites: IntoIterator<Item = &'sites Path>,
{
    let wanted = &path.steps;
    let width = wanted.len() + 1;
    if wanted.len() > MAX_STEPS || tree.nodes().len().saturating_mul(width) > MAX_CELLS {
        return Vec::new();
    }
    let table = Table::new(tree, wanted);
    let mut candidates = Vec::new();
    for node in 0..tree.nodes().len() {
        for site in sites(node) {
            let differences = u32::from(site.port != path.port)
                + u32::from(site.call != path.call)
                + u32::from(site.elements != path.elements);
            let cost = table.cost(node, wanted.len()) + OTHER_PORT * differences;
            candidates.push((cost, node, site));
        }
    }
    candidates.sort_by_key(|(cost, node, _)| (*cost, *node));
    let limit = candidates.first().map_or(0, |(best, ..)| best + SLACK);
    let mut texts: Vec<String> = Vec::new();
    for (_, node, site) in candidates.into_iter().take_while(|(cost, ..)| *cost <= limit) {
        let steps = table.steps(node);
        let steps = if tree.leads(&steps) { steps } else { tree.steps(node) };
        let text = site.with_steps(steps).to_string();
        if text.len() <= MAX_TEXT && !texts.contains(&text) {
            texts.push(text);
        }
        if texts.len() == SUGGESTIONS {
            break;
        }
    }
    texts
}

/// What it costs at least to turn the first steps of a path into a node's, for every node.
struct Table<'tree> {
    tree: &'tree Tree,
    wanted: &'tree [Step],
    cells: Vec<u32>,
}

impl<'tree> Table<'tree> {
    fn new(tree: &'tree Tree, wanted: &'tree [Step]) -> Self {
        let cells = Vec::with_capacity(tree.nodes().len() * (wanted.len() + 1));
        let mut table = Self { tree, wanted, cells };
        for node in 0..tree.nodes().len() {
            for count in 0..=wanted.len() {
                let ways = [
                    table.too_many(node, count),
                    table.left_out(node, count),
                    table.replaced(node, count),
                ];
                table.cells.push(ways.into_iter().flatten().min().unwrap_or(0));
            }
        }
        table
    }

    fn cost(&self, node: Id, count: usize) -> u32 {
        self.cells.get(node * (self.wanted.len() + 1) + count).copied().unwrap_or(u32::MAX / 2)
    }

    /// Returns the cost where the path's last step is one too many.
    fn too_many(&self, node: Id, count: usize) -> Option<u32> {
        let before = count.checked_sub(1)?;
        let number = matches!(self.wanted.get(before)?, Step::Select(_));
        Some(self.cost(node, before) + if number { NUMBER_TOO_MANY } else { TOO_MANY })
    }

    /// Returns the cost where the path leaves out the node's own step.
    fn left_out(&self, node: Id, count: usize) -> Option<u32> {
        let parent = self.tree.parent(node)?;
        Some(self.cost(parent, count) + LEFT_OUT)
    }

    /// Returns the cost where the path's last step stands for the node's own.
    fn replaced(&self, node: Id, count: usize) -> Option<u32> {
        let parent = self.tree.parent(node)?;
        let before = count.checked_sub(1)?;
        let difference = difference(self.wanted.get(before)?, &self.tree.nodes().get(node)?.step);
        Some(self.cost(parent, before) + difference)
    }

    /// Returns the node's steps, as the path writes them where both mean the same.
    fn steps(&self, node: Id) -> Vec<Step> {
        let mut steps = Vec::new();
        let (mut node, mut count) = (node, self.wanted.len());
        while let Some(parent) = self.tree.parent(node) {
            let own = self.tree.nodes().get(node).map(|node| &node.step);
            let cost = Some(self.cost(node, count));
            if cost == self.replaced(node, count) {
                count -= 1;
                let wanted = self.wanted.get(count);
                let same =
                    wanted.zip(own).is_some_and(|(wanted, own)| difference(wanted, own) == 0);
                steps.extend(if same { wanted } else { own }.cloned());
                node = parent;
            } else if cost == self.left_out(node, count) {
                steps.extend(own.cloned());
                node = parent;
            } else {
                count -= 1;
            }
        }
        steps.reverse();
        steps
    }
}

/// Returns how much a step of a path differs from a node's, 0 where it stands for it.
fn difference(wanted: &Step, own: &Step) -> u32 {
    match (wanted, own) {
        (Step::Select(Selector::Index(index @ 0..)), Step::Select(own)) => {
            if *own == Selector::Index(*index) { 0 } else { OTHER_NUMBER }
        }
        (Step::Select(_), Step::Select(_)) => 0,
        (Step::Name(wanted), Step::Name(own)) => name_difference(wanted, own),
        (Step::Select(_), Step::Name(_)) | (Step::Name(_), Step::Select(_)) => OTHER_NAME,
    }
}

fn name_difference(one: &str, other: &str) -> u32 {
    if one == other {
        return 0;
    }
    let longest = one.len().max(other.len());
    if longest > MAX_NAME_BYTES {
        return OTHER_NAME;
    }
    let distance = edit_distance(one, other);
    match u32::try_from(longest) {
        Ok(longest) if distance * 2 <= longest => 1 + 8 * distance / longest,
        _ if one.len().min(other.len()) < MIN_PART_BYTES => OTHER_NAME,
        _ if one.contains(other) || other.contains(one) => PART_OF_NAME,
        _ => OTHER_NAME,
    }
}

/// Returns how many characters must be put in, taken out, replaced or swapped with the next.
fn edit_distance(one: &str, other: &str) -> u32 {
    let other: Vec<char> = other.chars().collect();
    let mut before: Vec<u32> = Vec::new();
    let mut above: Vec<u32> = (0..).take(other.len() + 1).collect();
    let mut last = None;
    for (line, character) in (1..).zip(one.chars()) {
        let mut row = vec![line];
        for (column, letter) in other.iter().enumerate() {
            let cell =
                |row: &[u32], column: usize| row.get(column).copied().unwrap_or(u32::MAX / 2);
            let replaced = cell(&above, column) + u32::from(*letter != character);
            let kept = replaced.min(cell(&above, column + 1) + 1).min(cell(&row, column) + 1);
            let swap = column.checked_sub(1).filter(|previous| {
                Some(*letter) == last && other.get(*previous) == Some(&character)
            });
            let swapped = swap.map_or(u32::MAX, |previous| cell(&before, previous) + 1);
            row.push(kept.min(swapped));
        }
        last = Some(character);
        before = std::mem::replace(&mut above, row);
    }
    above.last().copied().unwrap_or(0)
}
