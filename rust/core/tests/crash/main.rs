//! Kills and power cuts: after each the store is at the version before or after the commit that
//! was under way, whole, and what is resumed ends with the shards of an uninterrupted run.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod cut;
mod power;
mod random;
mod record;
mod run;
mod stop;
#[path = "../support/mod.rs"]
mod support;
