//! The columns of the result table, which of their values are best, and the table in plain text.

use crate::report::Row;

/// Which end of a column is the good one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// A measured column.
pub(crate) struct Column {
    /// Heading.
    pub(crate) label: &'static str,
    pub(crate) better: Better,
    pub(crate) value: fn(&Row) -> Option<f64>,
    decimals: usize,
    /// What the number says, for readers of the page.
    pub(crate) meaning: &'static str,
}

/// The measured columns, left to right.
pub(crate) const COLUMNS: [Column; 7] = [
    Column {
        label: "latent MSE",
        better: Better::Lower,
        value: |row| row.latent_mse,
        decimals: 4,
        meaning: "mean squared difference between a model's final latents and the teacher's from the same prompt and noise",
    },
    Column {
        label: "PSNR dB",
        better: Better::Higher,
        value: |row| row.psnr_db,
        decimals: 2,
        meaning: "the same comparison in 8-bit pixels",
    },
    Column {
        label: "KID teacher",
        better: Better::Lower,
        value: |row| row.kid_teacher,
        decimals: 4,
        meaning: "distance between the set of a model's pictures and the set of the teacher's (Kernel Inception Distance with \
                  MobileNetV2 features); 0 within noise, slightly negative included, is alike",
    },
    Column {
        label: "KID real",
        better: Better::Lower,
        value: |row| row.kid_real,
        decimals: 4,
        meaning: "the same distance to real pictures",
    },
    Column {
        label: "top-1",
        better: Better::Higher,
        value: |row| row.top1,
        decimals: 3,
        meaning: "share of pictures whose nearest reference picture is the one of their own prompt",
    },
    Column {
        label: "top-5",
        better: Better::Higher,
        value: |row| row.top5,
        decimals: 3,
        meaning: "share of pictures with that reference among the five nearest",
    },
    Column {
        label: "s/picture",
        better: Better::Lower,
        value: |row| row.secs_per_image,
        decimals: 3,
        meaning: "wall time per picture",
    },
];

impl Column {
    /// A row's value as shown; a dash where it does not apply.
    pub(crate) fn text(&self, row: &Row) -> String {
        match self.finite(row) {
            Some(value) => format!("{value:.*}", self.decimals),
            None => "–".to_owned(),
        }
    }

    fn finite(&self, row: &Row) -> Option<f64> {
        (self.value)(row).filter(|value| value.is_finite())
    }

    /// The best value among the rows that are compared with the teacher; none when there is nothing to choose from.
    pub(crate) fn best(&self, rows: &[Row]) -> Option<f64> {
        let compared = rows.iter().filter(|row| is_compared(row));
        let mut values: Vec<f64> = compared.filter_map(|row| self.finite(row)).collect();
        values.sort_by(f64::total_cmp);
        let best = if self.better == Better::Lower { values.first() } else { values.last() };
        best.copied().filter(|_| values.len() > 1)
    }

    /// Whether a row holds the best value.
    pub(crate) fn is_best(&self, row: &Row, best: Option<f64>) -> bool {
        best.is_some() && is_compared(row) && self.finite(row) == best
    }
}

/// Whether a row is compared with the teacher, and not the teacher itself.
pub(crate) fn is_compared(row: &Row) -> bool {
    row.latent_mse.is_some()
}

/// The table with aligned columns, names to the left and numbers to the right; `*` marks the best values.
pub(crate) fn plain(rows: &[Row]) -> String {
    let head = ["model", "steps", "guidance"].into_iter().chain(COLUMNS.iter().map(|column| column.label));
    let best: Vec<_> = COLUMNS.iter().map(|column| column.best(rows)).collect();
    let mut lines: Vec<Vec<String>> = vec![head.map(|label| format!("{label} ")).collect()];
    lines.extend(rows.iter().map(|row| {
        let numbers = COLUMNS.iter().zip(&best).map(|(column, best)| {
            let mark = if column.is_best(row, *best) { '*' } else { ' ' };
            format!("{}{mark}", column.text(row))
        });
        let settings =
            [row.name.clone(), format!("{} ", row.num_inference_steps), format!("{} ", row.cfg_scale)];
        settings.into_iter().chain(numbers).collect()
    }));
    align(&lines)
}

fn align(lines: &[Vec<String>]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
        if index == 0 {
            text += &"-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1));
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, numbers: Option<[f64; 7]>) -> Row {
        let at = |index: usize| numbers.map(|numbers| numbers[index]);
        Row {
            name: name.into(),
            num_inference_steps: 4,
            cfg_scale: 1.0,
            latent_mse: at(0),
            psnr_db: at(1),
            kid_teacher: at(2),
            kid_real: at(3),
            top1: at(4),
            top5: at(5),
            secs_per_image: at(6),
        }
    }

    fn three_rows() -> Vec<Row> {
        let teacher = Row { kid_real: Some(0.0), top1: Some(1.0), ..row("teacher", None) };
        let base = row("base", Some([0.5, 12.0, 0.3, 0.4, 0.2, 0.5, 0.1]));
        vec![teacher, base, row("student", Some([0.1, 20.5, 0.05, f64::NAN, 0.9, 0.95, 0.2]))]
    }

    #[test]
    fn the_best_value_is_the_lowest_or_highest_as_the_column_says_and_never_the_teachers() {
        let rows = three_rows();
        let best: Vec<_> = COLUMNS.iter().map(|column| column.best(&rows)).collect();
        // Of kid_real one value is left, and a single value is not the best of anything.
        assert_eq!(best, [Some(0.1), Some(20.5), Some(0.05), None, Some(0.9), Some(0.95), Some(0.1)]);
    }

    #[test]
    fn the_plain_table_is_aligned_and_marked() {
        let expected = "\
model    steps   guidance   latent MSE   PSNR dB   KID teacher   KID real   top-1   top-5   s/picture
------------------------------------------------------------------------------------------------------
teacher      4          1            –         –             –     0.0000   1.000       –           –
base         4          1       0.5000     12.00        0.3000     0.4000   0.200   0.500       0.100*
student      4          1       0.1000*    20.50*       0.0500*         –   0.900*  0.950*      0.200
";
        let table = plain(&three_rows());
        let trimmed: Vec<&str> = table.lines().map(str::trim_end).collect();
        assert_eq!(trimmed, expected.lines().collect::<Vec<_>>(), "\n{table}");
    }
}
