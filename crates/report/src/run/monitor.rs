//! `monitor.csv`: how far a student is from its teacher on held-out prompts, as the trainer's monitor writes it.

use std::path::Path;

use super::read_text;

/// The monitor's file inside a run folder.
pub const MONITOR_FILE: &str = "monitor.csv";

/// One look at the student.
#[derive(Clone, Debug, PartialEq)]
pub struct MonitorLine {
    /// Optimiser steps done.
    pub step: u64,
    /// Mean squared error to the teacher's latents.
    pub paired_error: f64,
    /// Saturation, contrast, sharpness and diversity over the teacher's, in this order.
    pub ratios: [f64; 4],
    /// Whether it was the best so far.
    pub best: bool,
}

/// Name and column of each ratio; 1 is the teacher's own.
pub(super) const RATIOS: [(&str, &str); 4] = [
    ("saturation", "saturation_ratio"),
    ("contrast", "contrast_ratio"),
    ("sharpness", "sharpness_ratio"),
    ("diversity", "diversity_ratio"),
];

/// The whole lines of the file; columns are found by name, and a number that is missing is NaN.
pub(super) fn read(path: &Path) -> Vec<MonitorLine> {
    let text = read_text(path);
    let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let names: Vec<&str> = lines.next().unwrap_or_default().trim_end().split(',').collect();
    let line = |line: &str| {
        let cells: Vec<&str> = line.trim_end().split(',').collect();
        let cell = |name: &str| cells.get(names.iter().position(|column| *column == name)?).copied();
        let number = |name: &str| cell(name).and_then(|text| text.trim().parse().ok()).unwrap_or(f64::NAN);
        Some(MonitorLine {
            step: cell("step")?.parse().ok()?,
            paired_error: number("paired_error"),
            ratios: RATIOS.map(|(_, column)| number(column)),
            best: matches!(cell("best"), Some("1" | "true")),
        })
    };
    lines.filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_found_by_name_and_half_lines_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(MONITOR_FILE);
        let header = "step,paired_error,saturation_ratio,contrast_ratio,sharpness_ratio,diversity_ratio,best";
        std::fs::write(&path, format!("{header}\n10,0.5,1.1,0.9,0.8,,1\n20,0.4,1,1,1,1,0\n30,0.")).unwrap();
        let lines = read(&path);
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].step, lines[0].paired_error, lines[0].best), (10, 0.5, true));
        assert_eq!(lines[0].ratios[..3], [1.1, 0.9, 0.8]);
        assert!(lines[0].ratios[3].is_nan());
        assert_eq!(lines[1].ratios, [1.0; 4]);
        assert!(!lines[1].best);
    }
}
