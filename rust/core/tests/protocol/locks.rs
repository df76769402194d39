//! Rule 4: one writer, whatever else the process or its neighbours do.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use lamina_core::disk::{Directory, Disk};
use lamina_core::{Error, Store, probe};

use crate::support::{Job, disk, folder, verify};
use crate::tools::{Watched, files, manifest_path, parts};

const CHILD: &str = "LAMINA_TEST_LOCK_IN";

/// Not a test of its own: what `Neighbour` runs in another process.
#[test]
fn another_process_that_takes_the_lock() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let mut out = std::io::stderr();
    match Directory::open(path).unwrap().lock() {
        Ok(lock) => {
            writeln!(out, "neighbour: held").unwrap();
            // Until the pipe is closed.
            std::io::stdin().read_line(&mut String::new()).unwrap();
            drop(lock);
        }
        Err(error) => writeln!(out, "neighbour: {error}").unwrap(),
    }
}

/// Another process that tries to take a store's lock, and holds it if it can.
struct Neighbour {
    process: Child,
    said: String,
}

impl Neighbour {
    fn of(path: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "locks::another_process_that_takes_the_lock", "--nocapture"])
            .env(CHILD, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let said = lines
            .map(Result::unwrap)
            .find_map(|line| line.strip_prefix("neighbour: ").map(String::from));
        Self { process, said: said.unwrap() }
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}

fn job() -> Job {
    Job::new(&[vec![(3, 3)], vec![(2, 4)], vec![(3, 3)]], 4)
}

#[test]
fn a_second_writer_of_the_same_process_is_told_who_writes() {
    let directory = folder();
    let disk = disk(directory.path());
    let writer = job().begin(&disk).unwrap();
    let error = job().resume(&disk).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }));
    let (text, process) = (error.to_string(), std::process::id());
    assert!(text.contains(&format!("is in use by process {process} on host ")), "{text}");
    assert!(text.contains(" since 20") && text.ends_with(" UTC"), "{text}");
    drop(writer);
    assert!(job().resume(&disk).is_ok());
}

#[test]
fn a_second_writer_in_another_process_is_told_who_writes() {
    let directory = folder();
    let lock = disk(directory.path()).lock().unwrap();
    let told = Neighbour::of(directory.path()).said.clone();
    assert!(told.contains(&format!("is in use by process {}", std::process::id())), "{told}");
    drop(lock);
    let neighbour = Neighbour::of(directory.path());
    assert_eq!(neighbour.said, "held");
    let error = disk(directory.path()).lock().unwrap_err();
    let process = neighbour.process.id();
    assert!(error.to_string().contains(&format!("in use by process {process} on")), "{error}");
}

#[test]
fn a_killed_writer_blocks_nobody() {
    let directory = folder();
    let neighbour = Neighbour::of(directory.path());
    assert_eq!(neighbour.said, "held");
    neighbour.kill();
    assert!(files(directory.path(), "").contains(&String::from("OWNER")));
    assert!(disk(directory.path()).lock().is_ok());
    assert_eq!(files(directory.path(), ""), ["LOCK"]);
}

#[test]
fn reading_a_store_leaves_the_lock_of_its_writer_alone() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), job());
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 2);
    writer.commit().unwrap();
    probe(directory.path()).unwrap();
    job.check(directory.path(), 2);
    let told = Neighbour::of(directory.path()).said.clone();
    assert!(told.contains("is in use by"), "{told}");
}

#[test]
fn a_lock_that_a_stray_open_and_close_dropped_is_taken_again() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), job());
    let mut writer = job.begin(&disk).unwrap();
    std::fs::read(directory.path().join("LOCK")).unwrap();
    job.append_all(&mut writer, 0, 3);
    let told = Neighbour::of(directory.path()).said.clone();
    assert!(told.contains("is in use by"), "{told}");
    writer.finish().unwrap();
    job.check(directory.path(), 3);
}

#[test]
fn a_writer_whose_lock_another_process_took_ends_and_removes_nothing() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), job());
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 2);
    writer.commit().unwrap();
    job.append_all(&mut writer, 2, 3);
    let before = [files(directory.path(), "manifests"), files(directory.path(), "shards")];
    std::fs::read(directory.path().join("LOCK")).unwrap();
    let neighbour = Neighbour::of(directory.path());
    assert_eq!(neighbour.said, "held");
    let error = writer.commit().unwrap_err();
    let process = neighbour.process.id();
    assert!(error.to_string().contains(&format!("in use by process {process} on")), "{error}");
    assert!(matches!(job.append(&mut writer, 2), Err(Error::Closed { .. })));
    drop(writer);
    assert_eq!([files(directory.path(), "manifests"), files(directory.path(), "shards")], before);
    assert!(files(directory.path(), "").contains(&String::from("OWNER")), "it is the neighbour's");
}

#[test]
fn an_unexpected_highest_version_ends_the_writer_and_removes_nothing() {
    type Step = fn(&Job, &mut lamina_core::Writer) -> lamina_core::Result<()>;
    let steps: [Step; 3] = [
        |job, writer| job.append(writer, 2).map(|_| ()),
        |_, writer| writer.commit(),
        |_, writer| writer.finish(),
    ];
    for step in steps {
        let directory = folder();
        let (disk, job) = (disk(directory.path()), job());
        let mut writer = job.begin(&disk).unwrap();
        job.append_all(&mut writer, 0, 1);
        writer.commit().unwrap();
        job.append_all(&mut writer, 1, 2);
        std::fs::copy(manifest_path(directory.path(), 2), manifest_path(directory.path(), 7))
            .unwrap();
        let before = [files(directory.path(), "manifests"), files(directory.path(), "shards")];
        assert!(parts(directory.path()) > 0);
        let error = step(&job, &mut writer).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("expected version 2, found 7; nothing was removed"), "{text}");
        assert!(matches!(writer.commit(), Err(Error::Closed { .. })));
        drop(writer);
        let after = [files(directory.path(), "manifests"), files(directory.path(), "shards")];
        assert_eq!(after, before);
    }
}

#[test]
fn a_version_that_another_writer_linked_first_is_not_overwritten() {
    let directory = folder();
    let job = job();
    let (disk, events) = Watched::over(directory.path());
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 1);
    // In between the check and the link: the check lists, the link then finds the name taken.
    let theirs = manifest_path(directory.path(), 2);
    let hook = theirs.clone();
    events.lock().unwrap().before = Some((
        String::from("link manifests/"),
        Box::new(move || std::fs::write(&hook, "theirs").unwrap()),
    ));
    let error = writer.commit().unwrap_err();
    assert!(matches!(error, Error::Overtaken { expected: 1, found: 2, .. }), "{error}");
    assert_eq!(std::fs::read(theirs).unwrap(), b"theirs");
}

#[test]
fn the_lock_is_taken_again_before_every_publication_and_every_removal() {
    let directory = folder();
    let job = job();
    let (disk, events) = Watched::over(directory.path());
    let mut writer = job.begin(&disk).unwrap();
    for window in 0..3 {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    writer.finish().unwrap();
    let log = events.lock().unwrap().log.clone();
    let mut seen = 0;
    for (at, event) in log.iter().enumerate() {
        let is_ours = event.starts_with("rename shards/")
            || (event.starts_with("remove") && !event.ends_with("next.part"))
            || event.starts_with("create manifests/");
        if is_ours {
            seen += 1;
            // A version's folder is fsynced between the check and its manifest.
            let before: Vec<&str> = log[..at]
                .iter()
                .rev()
                .map(String::as_str)
                .filter(|e| !e.starts_with("sync"))
                .take(2)
                .collect();
            assert_eq!(before, ["list manifests/", "lock"], "before `{event}`");
        }
    }
    assert!(seen > 10);
    assert_eq!(verify(&Store::open(directory.path(), None).unwrap()), Ok(()));
}
