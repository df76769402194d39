//! The tree of modules that paths are looked up in: patterns become nodes without comparing texts.
//!
//! Promises: nodes come in the order in which they were added, parents before children; no
//! recursion, so that depth costs memory only; explicit indices, those of a list one by one, must
//! lead somewhere, while a slice takes what there is.

use std::collections::{BTreeMap, BTreeSet};

use super::error::excerpt;
use super::{FindError, List, Path, Selector, Slice, Step};

/// The place of a node in its tree.
pub(super) type Id = usize;

/// The node of the model itself.
const ROOT: Id = 0;

/// How many of the existing numbers an error shows.
const NUMBERS_SHOWN: usize = 4;

#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) step: Step,
    parent: Id,
    depth: usize,
    children: BTreeMap<Step, Id>,
    length: u64, // one more than the highest number among the children, or as told
}

/// Where a walk ended without any node: before which step, and the nodes that it had come to.
struct Miss {
    depth: usize,
    nodes: Vec<Id>,
}

impl Tree {
    /// Makes a tree of the model alone.
    pub(super) fn new() -> Self {
        let step = Step::Name("model".into());
        let children = BTreeMap::new();
        Self { nodes: vec![Node { step, parent: ROOT, depth: 0, children, length: 0 }] }
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Returns the node at the end of concrete steps, made with those above it where it is new.
    pub(super) fn add(&mut self, steps: impl IntoIterator<Item = Step>) -> Id {
        steps.into_iter().fold(ROOT, |parent, step| self.child(parent, step))
    }

    fn child(&mut self, parent: Id, step: Step) -> Id {
        let next = self.nodes.len();
        let Some(node) = self.nodes.get_mut(parent) else {
            return ROOT;
        };
        if let Some(child) = node.children.get(&step) {
            return *child;
        }
        if let Some(index) = step.number() {
            node.length = node.length.max(index.unsigned_abs() + 1);
        }
        let depth = node.depth + 1;
        node.children.insert(step.clone(), next);
        self.nodes.push(Node { step, parent, depth, children: BTreeMap::new(), length: 0 });
        next
    }

    /// Returns the node above another, none above the root.
    pub(super) fn parent(&self, node: Id) -> Option<Id> {
        self.nodes.get(node).filter(|_| node != ROOT).map(|node| node.parent)
    }

    /// Tells how many entries a container really has, where not all of them are in the tree.
    pub(super) fn set_length(&mut self, steps: &[Step], length: u64) {
        if let Some(node) = self.node(steps).and_then(|node| self.nodes.get_mut(node)) {
            node.length = node.length.max(length);
        }
    }

    /// Returns the node at the end of concrete steps.
    pub(super) fn node(&self, steps: &[Step]) -> Option<Id> {
        self.walk(ROOT, steps).ok().and_then(|nodes| nodes.first().copied())
    }

    /// Returns whether steps from the root stand for any node.
    pub(super) fn leads(&self, steps: &[Step]) -> bool {
        self.walk(ROOT, steps).is_ok()
    }

    /// Returns how many entries a container has, 0 where it is none.
    pub(super) fn length(&self, node: Id) -> u64 {
        self.nodes.get(node).map_or(0, |node| node.length)
    }

    /// Returns the steps from the root to a node.
    pub(super) fn steps(&self, node: Id) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut at = node;
        while at != ROOT
            && let Some(node) = self.nodes.get(at)
        {
            steps.push(node.step.clone());
            at = node.parent;
        }
        steps.reverse();
        steps
    }

    /// Returns the accepted nodes that a path stands for: read from the root, and where that finds
    /// none, as the modules' own names. `unknown` is the error for a path that leads nowhere.
    pub(super) fn find(
        &self,
        path: &Path,
        accept: impl Fn(Id) -> bool,
        unknown: impl Fn(&Path) -> FindError,
    ) -> Result<Vec<Id>, FindError> {
        let child =
            self.nodes.first().and_then(|root| root.children.get(&Step::Name("model".into())));
        let mut furthest: Option<Miss> = None;
        for start in [Some(ROOT), child.copied()].into_iter().flatten() {
            let miss = match self.walk(start, &path.steps) {
                Ok(mut nodes) => {
                    nodes.retain(|node| accept(*node));
                    if !nodes.is_empty() {
                        return match self.list_entry_without(path, start, &nodes) {
                            Some(alone) => Err(unknown(&alone)),
                            None => Ok(nodes),
                        };
                    }
                    Miss { depth: path.steps.len(), nodes }
                }
                Err(miss) => miss,
            };
            if furthest.as_ref().is_none_or(|earlier| miss.depth > earlier.depth) {
                furthest = Some(miss);
            }
        }
        let told = furthest.and_then(|miss| self.explain(path, &miss));
        Err(told.unwrap_or_else(|| unknown(path)))
    }

    /// Follows steps from a node to all the nodes that they stand for.
    fn walk(&self, start: Id, steps: &[Step]) -> Result<Vec<Id>, Miss> {
        let mut nodes = vec![start];
        for (depth, step) in steps.iter().enumerate() {
            let mut next = Vec::new();
            for node in nodes.iter().filter_map(|node| self.nodes.get(*node)) {
                node.follow(step, &mut next);
            }
            if let Step::Select(Selector::List(list)) = step
                && self.first_missing(list, &nodes).is_some()
            {
                next.clear();
            }
            if next.is_empty() {
                return Err(Miss { depth, nodes });
            }
            nodes = next;
        }
        Ok(nodes)
    }

    /// Returns the first entry of a list that none of these nodes has.
    fn first_missing(&self, list: &List, nodes: &[Id]) -> Option<i64> {
        let mut missing: BTreeSet<i64> = list.entries().iter().copied().collect();
        for node in nodes.iter().filter_map(|node| self.nodes.get(*node)) {
            missing.retain(|entry| node.numbered(*entry).is_none());
            if missing.is_empty() {
                return None;
            }
        }
        list.entries().iter().copied().find(|entry| missing.contains(entry))
    }

    /// Returns the path with one entry in the place of a list, where that entry exists but has led
    /// to none of these nodes.
    fn list_entry_without(&self, path: &Path, start: Id, found: &[Id]) -> Option<Path> {
        let base = self.nodes.get(start).map_or(0, |node| node.depth);
        for (depth, step) in path.steps.iter().enumerate() {
            let Step::Select(Selector::List(list)) = step else {
                continue;
            };
            let mut missing: BTreeSet<i64> = list.entries().iter().copied().collect();
            for node in found.iter().filter_map(|node| self.above(*node, base + depth + 1)) {
                if let Some(index) = node.step.number() {
                    let from_end = i128::from(index) - i128::from(self.length(node.parent));
                    missing.remove(&index);
                    missing.remove(&i64::try_from(from_end).unwrap_or(index));
                }
            }
            if let Some(entry) = list.entries().iter().find(|entry| missing.contains(entry)) {
                let mut steps = path.steps.to_vec();
                *steps.get_mut(depth)? = Step::Select(Selector::Index(*entry));
                return Some(path.with_steps(steps));
            }
        }
        None
    }

    /// Returns the node at a depth above another, or that one itself.
    fn above(&self, node: Id, depth: usize) -> Option<&Node> {
        let mut node = self.nodes.get(node)?;
        while node.depth > depth {
            node = self.nodes.get(node.parent)?;
        }
        Some(node)
    }

    /// Returns what a container has instead, where an index or slice is why nothing was found.
    fn explain(&self, path: &Path, miss: &Miss) -> Option<FindError> {
        let Step::Select(selector) = path.steps.get(miss.depth)? else {
            return None;
        };
        let id = miss.nodes.iter().copied().find(|node| self.length(*node) > 0)?;
        let node = self.nodes.get(id)?;
        let container = excerpt(&module_text(&self.steps(id)), 0);
        let (path, length) = (path.boxed(), node.length);
        let index = match selector {
            Selector::Index(index) => *index,
            Selector::List(list) => self.first_missing(list, &miss.nodes)?,
            Selector::Slice(slice) => {
                let selector = slice.to_string().into();
                return Some(FindError::Slice { path, container, selector, length });
            }
        };
        let children = node.numbers_near(index);
        Some(FindError::Index { path, container, index, length, children })
    }
}

impl Node {
    /// Adds the children that a step stands for, in their order.
    fn follow(&self, step: &Step, next: &mut Vec<Id>) {
        match step {
            Step::Name(_) => next.extend(self.children.get(step)),
            Step::Select(Selector::Index(index)) => next.extend(self.numbered(*index)),
            Step::Select(Selector::List(list)) => {
                let found = list.entries().iter().filter_map(|entry| self.numbered(*entry));
                next.extend(found.collect::<BTreeSet<_>>());
            }
            Step::Select(Selector::Slice(slice)) => {
                let Some((first, last)) = slice.within(self.length) else {
                    return;
                };
                let numbered = self.children.range(numbered(first)..=numbered(last));
                let hit = |step: &Step| {
                    let offset = step.number().and_then(|index| index.checked_sub(first));
                    offset.is_some_and(|offset| offset % slice.step == 0)
                };
                next.extend(numbered.filter(|(step, _)| hit(step)).map(|(_, child)| child));
            }
        }
    }

    /// Returns the child with a number, counted from the end where that is negative.
    fn numbered(&self, index: i64) -> Option<Id> {
        let from_end = i128::from(index) + i128::from(self.length);
        let index = if index < 0 { i64::try_from(from_end).ok()? } else { index };
        self.children.get(&numbered(index)).copied()
    }

    /// Returns the existing numbers nearest to one, or none where all below the length exist.
    fn numbers_near(&self, index: i64) -> Vec<i64> {
        let mut numbers: Vec<i64> = self.children.keys().filter_map(Step::number).collect();
        if u64::try_from(numbers.len()).is_ok_and(|count| count == self.length) {
            return Vec::new();
        }
        let from_end = i128::from(index) + i128::from(self.length);
        let wanted = if index < 0 { from_end } else { i128::from(index) };
        numbers.sort_by_key(|number| (i128::from(*number) - wanted).abs());
        numbers.truncate(NUMBERS_SHOWN);
        numbers.sort_unstable();
        numbers
    }
}

impl Step {
    /// Returns the number of a concrete step that has one.
    fn number(&self) -> Option<i64> {
        match self {
            Self::Select(Selector::Index(index)) => Some(*index),
            Self::Select(Selector::Slice(_) | Selector::List(_)) | Self::Name(_) => None,
        }
    }
}

impl Slice {
    /// Returns the first and the last number of this range in a container of some length.
    fn within(&self, length: u64) -> Option<(i64, i64)> {
        let length = i128::from(length);
        let clamp = |bound: i64| match i128::from(bound) {
            from_end @ ..0 => (from_end + length).max(0),
            bound => bound.min(length),
        };
        let start = self.start.map_or(0, clamp);
        let last = self.stop.map_or(length, clamp) - 1;
        let last = i64::try_from(last.min(i128::from(i64::MAX))).ok()?;
        i64::try_from(start).ok().filter(|start| *start <= last).map(|start| (start, last))
    }
}

fn numbered(index: i64) -> Step {
    Step::Select(Selector::Index(index))
}

/// Returns the text of a module, without a port.
pub(super) fn module_text(steps: &[Step]) -> String {
    steps.iter().fold(String::from("model"), |text, step| text + &step.to_string())
}
