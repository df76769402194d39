//! A column as one tensor: every shard's region mapped into one reserved range.

use crate::disk::{DiskFile, Folder};
use crate::error::{Error, Result};
use crate::layout::HUGE_PAGE;
use crate::map::{OwnedMap, SharedMap, page_bytes};
use crate::shard::{Shard, length};
use crate::store::{Store, View};

impl Store {
    /// Returns all rows of a site as one range, in a mapping of its own that may be written to
    /// without reaching the file.
    ///
    /// Full shards and the first short one are mapped; what does not start at a page boundary is
    /// copied into private pages.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], [`Error::Damaged`] (size, header or tables), [`Error::Map`].
    pub fn column(&self, site: usize) -> Result<SharedMap> {
        self.with_view(|view| self.map_column(view, site))
    }

    fn map_column(&self, view: &View, site: usize) -> Result<SharedMap> {
        let row_bytes = self.plan().row_bytes(site);
        let total = self.rows().saturating_mul(row_bytes);
        let full = self.plan().rows_per_shard();
        let page = page_bytes() as u64;
        let mut column: Option<OwnedMap> = None;
        for (index, start) in view.starts.iter().enumerate() {
            let rows = view.manifest.shards.get(index).map_or(0, |shard| shard.rows);
            let rows = rows.min(self.rows().saturating_sub(start.row));
            if rows == 0 {
                continue;
            }
            let opened = view.open(self.disk(), index)?;
            let Some(region) = opened.shard.layout().site(site).copied() else {
                continue;
            };
            let column = match &mut column {
                Some(column) => column,
                empty @ None => {
                    let congruent =
                        if region.offset.is_multiple_of(page) { region.offset } else { 0 };
                    let reserved = OwnedMap::reserve(length(total), congruent % HUGE_PAGE)?;
                    empty.insert(reserved)
                }
            };
            let at = start.row * row_bytes;
            let bytes = rows * row_bytes;
            let follows_full = start.row.is_multiple_of(full);
            if follows_full && at.is_multiple_of(page) && region.offset.is_multiple_of(page) {
                let name = opened.shard.entry().file_name();
                let file = self.disk().open(Folder::Shards, &name).map_err(|error| {
                    if error.is_not_found() { self.missing(&opened.shard) } else { error }
                })?;
                if file.id()? != opened.shard.id() && !self.is_same(&opened.shard, &*file)? {
                    let place = crate::shard::place(
                        opened.shard.entry(),
                        opened.shard.start(),
                        "whole file",
                        (0, rows),
                    );
                    let found = String::from(
                        "the file was replaced or changed its size since it was checked",
                    );
                    return Err(Error::Damaged { place: Box::new(place), found });
                }
                if let Some(descriptor) = file.descriptor() {
                    column.place(length(at), descriptor, region.offset, length(bytes))?;
                    continue;
                }
            }
            let source = opened.shard.region_bytes(&region).unwrap_or_default();
            let target = column.bytes_mut().get_mut(length(at)..length(at + bytes));
            let (Some(target), Some(source)) = (target, source.get(..length(bytes))) else {
                return Err(Error::Mismatch {
                    what: String::from("a region of a checked shard"),
                    expected: format!("{bytes} bytes in a mapped file"),
                    found: format!("{}", source.len()),
                });
            };
            target.copy_from_slice(source);
        }
        match column {
            Some(column) => Ok(column.share()),
            None => Ok(OwnedMap::reserve(0, 0)?.share()),
        }
    }

    /// Returns whether another file under a checked shard's name is that shard too: the name stands
    /// for the bytes, and a damaged file may have been replaced by a sound one.
    fn is_same(&self, shard: &Shard, file: &dyn DiskFile) -> Result<bool> {
        let plan = &self.manifest().plan;
        let again = Shard::open(self.disk(), plan, shard.entry(), shard.start())?;
        Ok(again.id() == file.id()?)
    }

    fn missing(&self, shard: &Shard) -> Error {
        let rows = (0, shard.entry().rows);
        let place = crate::shard::place(shard.entry(), shard.start(), "whole file", rows);
        Error::Missing { place: Box::new(place), version: self.manifest().version }
    }
}
