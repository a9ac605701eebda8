//! What opening a large image costs: tables of 16 Mi entries, all of them allocated or none.
//!
//! 16 TiB in clusters of 1 MiB, in a file system that takes such files (in memory if need be); and 8 TiB in clusters of
//! 512 KiB on the disk, where opening for writing also makes the in-use mark durable. Figures are for a warm page cache:
//! the table is read through it before.

use crate::report::{Reporter, median};
use crate::sparse;
use crate::work::{Failure, Work, base_folder, cpu_seconds};
use ploop_core::io::Access;
use ploop_core::io::file::Caching;
use ploop_core::ops::open::{OpenOptions, open};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

const ENTRIES: u64 = 16 << 20;
const ROUNDS: usize = 11;

fn measure(reporter: &Reporter, path: &Path, disk: &str, full: bool) -> Result<(), Failure> {
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let (mut open_ms, mut cpu_ms) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let options = OpenOptions { caching: Caching::Cached, ..OpenOptions::new(path, access) };
            let (started, cpu) = (Instant::now(), cpu_seconds()?);
            let opened = open(&options)?;
            open_ms.push(started.elapsed().as_secs_f64() * 1e3);
            cpu_ms.push((cpu_seconds()? - cpu) * 1e3);
            opened.chain.close()?;
        }
        let figures = json!({
            "disk": disk, "allocated": if full { "all" } else { "none" }, "access": format!("{access:?}"),
            "open_ms": median(&open_ms), "cpu_ms": median(&cpu_ms), "wanted_ms_max": 50,
        });
        reporter.figure("open", figures);
    }
    Ok(())
}

/// Measures and reports.
pub fn bench(reporter: &Reporter) -> Result<(), Failure> {
    let work = Work::new()?;
    let long = sparse::folder_for_long_files(&base_folder())?;
    for full in [false, true] {
        let path = work.path("half.hds");
        sparse::image(&path, ENTRIES, 1024, full)?;
        measure(reporter, &path, "8 TiB, clusters of 512 KiB", full)?;
        std::fs::remove_file(&path)?;
        let Some(folder) = &long else {
            eprintln!("SKIP: no folder takes a file of 16 TiB");
            continue;
        };
        let path = folder.path().join("whole.hds");
        sparse::image(&path, ENTRIES, 2048, full)?;
        measure(reporter, &path, "16 TiB, clusters of 1 MiB", full)?;
        std::fs::remove_file(&path)?;
    }
    Ok(())
}
