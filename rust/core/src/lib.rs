//! The core of lamina, an activation store for `PyTorch` language models.
//!
//! It owns everything that must be exact or fast: the grammar of paths, the order of sites, the
//! bytes on disk, commit and recovery, mapping, gathering and checksums. It knows nothing of
//! Python or torch. `docs/format.md` has the format, `docs/design.md` the reasons.

pub mod checksum;
pub mod disk;
pub mod dtype;
pub mod error;
pub mod layout;
pub mod manifest;
pub mod map;
pub mod path;
pub mod shard;
pub mod side;
pub mod source;
pub mod stats;

mod build;
mod column;
mod commit;
mod filling;
mod gather;
mod header;
mod lock;
mod prompts;
mod publish;
mod rebuild;
mod store;
mod stream;
mod tier;
mod verify;
mod window;

pub use commit::{NewStore, Pace, Writer};
pub use error::{Error, Place, Result};
pub use lock::Lock;
pub use prompts::PromptRows;
pub use store::{Probe, Store, probe};
pub use tier::Tier;
pub use verify::Damage;
pub use window::Window;

/// What the file `FORMAT` says: a reader refuses another major version and accepts another minor.
pub const FORMAT: &str = "lamina 1.0";
