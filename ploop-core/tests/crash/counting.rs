//! Counts of a run, printed and kept in `target/tmp/counts`, where `make test` shows them: they may not shrink unseen.

use std::path::Path;

/// Prints `text` and keeps it under `name`, over that of the last run.
pub(crate) fn count(name: &str, text: &str) {
    println!("{name}: {text}");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("counts");
    let name: String =
        name.chars().map(|letter| if letter.is_alphanumeric() { letter } else { '-' }).collect();
    let kept = std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(folder.join(format!("{name}.txt")), format!("{name}: {text}\n")));
    if let Err(error) = kept {
        println!("the count is not kept: {error}");
    }
}
