//! What can go wrong, as facts. Messages say what was wrong, where, what was found, what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error as ThisError;

use crate::map::MapError;
use crate::path::PathError;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Where damage lies: in global rows and prompts of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The shard's file name.
    pub shard: String,
    /// The site, or the side tensor (`#row.token`), or `header`.
    pub site: String,
    /// The rows concerned, half-open.
    pub rows: (u64, u64),
    /// The prompts concerned, half-open.
    pub prompts: (u64, u64),
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "shard {}, {}, rows {}..{} of prompts {}..{}",
            self.shard, self.site, self.rows.0, self.rows.1, self.prompts.0, self.prompts.1
        )
    }
}

/// Everything that can go wrong in the core.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {operation} `{}`: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no room on the disk.
    #[error(
        "no room left on the disk of `{}`: {needed} more bytes were needed, {free} are free; \
         what was committed is kept: make room and run the same again",
        path.display()
    )]
    Full {
        /// The file that was being written.
        path: PathBuf,
        /// Bytes that were to be written or reserved.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// A text is no path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Memory could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A dtype nobody knows.
    #[error("unknown dtype `{found}`: expected a torch name such as `bfloat16`, or `bf16`, `BF16`")]
    UnknownDtype {
        /// The text, shortened.
        found: String,
    },
    /// No store here.
    #[error("there is no lamina store at `{}`", path.display())]
    NotFound {
        /// The directory.
        path: PathBuf,
    },
    /// A store is here already.
    #[error("`{}` already holds a store: choose another directory, or remove it with `rm -r`", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// A directory with things that are not ours.
    #[error(
        "`{}` is not empty and not a lamina store: found {}; nothing was touched, choose another directory",
        path.display(), found.join(", ")
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// A few of the names in it.
        found: Vec<String>,
    },
    /// A store without a version yet.
    #[error("the store at `{}` has no committed version yet{}", path.display(), owner_note(owner.as_ref()))]
    NotReady {
        /// The directory.
        path: PathBuf,
        /// Who is writing, as far as `OWNER` says.
        owner: Option<String>,
    },
    /// Another writer.
    #[error("the store at `{}` is in use by {owner}", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// `process N on host H since T`.
        owner: String,
    },
    /// Another writer got in between.
    #[error(
        "the store at `{}` was changed by another writer: expected version {expected}, found {found}; \
         nothing was removed",
        path.display()
    )]
    Overtaken {
        /// The directory.
        path: PathBuf,
        /// The version this writer committed or opened.
        expected: u64,
        /// The highest version that is there.
        found: u64,
    },
    /// A newer format.
    #[error(
        "the store at `{}` has format {found:?}, this lamina reads `{}`: install a newer lamina",
        path.display(), crate::FORMAT
    )]
    Newer {
        /// The directory.
        path: PathBuf,
        /// What `FORMAT` says, shortened.
        found: String,
    },
    /// A version that is not there.
    #[error("the store at `{}` has no version {version}; it has {}", path.display(), list(present))]
    NoVersion {
        /// The directory.
        path: PathBuf,
        /// The version asked for.
        version: u64,
        /// The versions that are there.
        present: Vec<u64>,
    },
    /// A manifest whose bytes are not those that were written.
    #[error("the manifest `{}` is damaged: {found}{}", path.display(), older_note(*older))]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
        /// An older version that is there.
        older: Option<u64>,
    },
    /// A shard whose bytes are not those that were written.
    #[error("damaged {place}: {found}")]
    Damaged {
        /// Where.
        place: Box<Place>,
        /// What is wrong.
        found: String,
    },
    /// A shard that is gone.
    #[error("missing {place}: the file is not there, although version {version} names it")]
    Missing {
        /// Where.
        place: Box<Place>,
        /// The newest version.
        version: u64,
    },
    /// Rows outside the store.
    #[error("row {row} is out of range: there are {rows} rows")]
    Row {
        /// The row asked for.
        row: i64,
        /// How many there are.
        rows: u64,
    },
    /// Prompts outside the store.
    #[error("prompt {prompt} is out of range: there are {prompts} prompts")]
    Prompt {
        /// The prompt asked for.
        prompt: i64,
        /// How many there are.
        prompts: u64,
    },
    /// Something handed over does not fit.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// What was handed over.
        what: String,
        /// What would fit.
        expected: String,
        /// What it was.
        found: String,
    },
    /// Sites that cannot be stored.
    #[error("site `{path}` cannot be stored: {found}")]
    Site {
        /// The site.
        path: String,
        /// Why.
        found: String,
    },
    /// JSON handed over is not JSON.
    #[error("{what} is not JSON: {source}")]
    Json {
        /// Which text.
        what: &'static str,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A writer that has ended.
    #[error("this writer has ended: {reason}")]
    Closed {
        /// Why.
        reason: String,
    },
}

fn owner_note(owner: Option<&String>) -> String {
    owner.map_or_else(
        || String::from(": nobody is writing it, run the capture again to begin it anew"),
        |owner| format!(": {owner} is writing it"),
    )
}

fn older_note(older: Option<u64>) -> String {
    older.map_or_else(String::new, |version| {
        format!("; version {version} is there: open it with version={version}")
    })
}

fn list(versions: &[u64]) -> String {
    if versions.is_empty() {
        return String::from("none");
    }
    versions.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

impl Error {
    /// Returns an I/O error with its path.
    pub fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Io { operation, path: path.into(), source: source.into() }
    }

    /// Returns the system's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        if let Self::Io { source, .. } = self {
            return source.raw_os_error();
        }
        if let Self::Map(error) = self {
            return error.errno().map(rustix::io::Errno::raw_os_error);
        }
        let full = matches!(self, Self::Full { .. });
        full.then(|| rustix::io::Errno::NOSPC.raw_os_error())
    }

    /// Returns the error of a missing shard with the version that names it; others as they are.
    #[must_use]
    pub fn at_version(mut self, newest: u64) -> Self {
        if let Self::Missing { version, .. } = &mut self {
            *version = newest;
        }
        self
    }

    /// Returns whether this is the system saying that a file does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
