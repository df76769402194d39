//! The rules of the disk format, one by one: each test fails without its rule.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

mod bytes;
mod columns;
mod commits;
mod damage;
mod files;
mod hostile;
mod locks;
mod prompts;
mod properties;
mod room;
#[path = "../support/mod.rs"]
mod support;
mod tools;
