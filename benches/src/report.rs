//! One JSON line per figure: what was measured, against whom, where and on which commit.

use serde_json::{Value, json};
use std::process::Command;

/// Prints figures on standard output, a line each.
pub struct Reporter {
    commit: String,
    kernel: String,
    processors: usize,
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

impl Reporter {
    /// A reporter that knows the commit and the machine.
    pub fn new() -> Self {
        Self {
            commit: first_line("git", &["rev-parse", "--short", "HEAD"]),
            kernel: first_line("uname", &["-r"]),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// One figure. `fields` is a JSON object with the bench's own values, units in their names.
    pub fn figure(&self, bench: &str, fields: Value) {
        let mut line = json!({
            "bench": bench, "commit": self.commit, "kernel": self.kernel, "processors": self.processors,
        });
        if let (Some(line), Value::Object(fields)) = (line.as_object_mut(), fields) {
            line.extend(fields);
        }
        println!("{line}");
    }
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new()
    }
}

/// The middle value; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// The value that so many of a hundred do not exceed; NaN of nothing.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::{median, percentile};

    #[test]
    fn percentiles_of_a_hundred() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&hundred, 99), 99.0);
        assert_eq!(percentile(&hundred, 100), 100.0);
        assert_eq!(percentile(&[7.0], 99), 7.0);
        assert!(percentile(&[], 99).is_nan());
    }

    #[test]
    fn median_is_the_middle() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    }
}
