//! The parts of a run's page that are written here: state, charts, events and recipe.

use std::fmt::Write;

use super::Run;
use super::log::{Happening, LogEntry};
use super::monitor::{MonitorLine, RATIOS};
use super::state::{State, Status};
use crate::charts::{Chart, Curve, escape};
use crate::html::duration;

/// Events listed, the newest.
const MAX_EVENTS: usize = 40;
/// A curve's strong line averages over one of so many parts of its points.
const SMOOTHING: usize = 16;

/// Status, progress and the latest numbers.
pub(super) fn state(state: &State, log: &[LogEntry]) -> String {
    let (class, words) = status(state);
    let bar = state.total_steps.map_or(String::new(), |total| {
        format!("<progress max=\"{total}\" value=\"{}\" aria-label=\"steps done\"></progress>", state.step)
    });
    let numbers: String = numbers(state, log)
        .into_iter()
        .map(|(name, value)| format!("<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value)))
        .collect();
    format!("<p class=\"status {class}\">{words}</p>{bar}<dl class=\"numbers\">{numbers}</dl>")
}

/// A class of the style sheet, and HTML.
fn status(state: &State) -> (&'static str, String) {
    let step = match state.total_steps {
        Some(total) => format!("step {} of {total}", state.step),
        None => format!("step {}", state.step),
    };
    match &state.status {
        Status::Waiting => ("waiting", "<b>Waiting</b> for the run to begin".into()),
        Status::Running => ("running", format!("<b>Running</b> · {step}")),
        Status::Quiet(secs) => (
            "quiet",
            format!("<b>Silent</b> for {} · {step}; very slow, or no longer there", duration(*secs)),
        ),
        Status::Finished => ("finished", format!("<b>Finished</b> · {step}")),
        Status::Stopped => ("stopped", format!("<b>Stopped</b> · {step}; the same command continues")),
        Status::Failed(error) => ("failed", format!("<b>Failed</b> · {step}: {}", escape(error))),
    }
}

/// Name and value of what a person asks first.
fn numbers(state: &State, log: &[LogEntry]) -> Vec<(&'static str, String)> {
    let mut numbers = Vec::new();
    let Some(Happening::Train { loss, gradient_norm, learning_rate, samples_per_sec, memory_bytes, .. }) =
        log.iter().rev().map(|entry| &entry.what).find(|what| matches!(what, Happening::Train { .. }))
    else {
        return numbers;
    };
    numbers.push(("loss", loss.map_or("not a number".into(), short)));
    numbers.extend(state.secs_left().map(|secs| ("time left", duration(secs))));
    numbers.extend(state.steps_per_sec.map(|rate| ("speed", speed(rate))));
    numbers.extend(samples_per_sec.map(|rate| ("samples per second", short(rate))));
    numbers.push(("learning rate", short(*learning_rate)));
    numbers.extend(gradient_norm.map(|norm| ("gradient norm", short(norm))));
    numbers.extend(memory_bytes.map(|bytes| ("memory", memory(bytes))));
    numbers
}

fn speed(steps_per_sec: f64) -> String {
    match steps_per_sec {
        1.0.. => format!("{} steps/s", short(steps_per_sec)),
        _ => format!("{} s/step", short(1.0 / steps_per_sec)),
    }
}

fn memory(bytes: u64) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    if mebibytes < 1024.0 { format!("{mebibytes:.0} MiB") } else { format!("{:.2} GiB", mebibytes / 1024.0) }
}

/// Three significant digits.
fn short(value: f64) -> String {
    let magnitude = value.abs();
    match magnitude {
        0.0 => "0".into(),
        100.0..1e6 => format!("{value:.0}"),
        10.0..100.0 => format!("{value:.1}"),
        1.0..10.0 => format!("{value:.2}"),
        0.1..1.0 => format!("{value:.3}"),
        0.01..0.1 => format!("{value:.4}"),
        0.001..0.01 => format!("{value:.5}"),
        _ => format!("{value:.2e}"),
    }
}

/// The curves of a run.
pub(super) fn charts(run: &Run) -> Vec<Chart> {
    type Value = fn(&Happening) -> Option<f64>;
    let train = |name: &str, value: Value| {
        let points = run.log.iter().filter_map(|entry| match &entry.what {
            what @ Happening::Train { .. } => Some((entry.step as f64, value(what).unwrap_or(f64::NAN))),
            _ => None,
        });
        Curve { name: name.into(), points: points.collect() }
    };
    let loss = train("loss", |what| if let Happening::Train { loss, .. } = what { *loss } else { None });
    let norm = train("gradient norm", |what| match what {
        Happening::Train { gradient_norm, .. } => *gradient_norm,
        _ => None,
    });
    let rate = train("learning rate", |what| match what {
        Happening::Train { learning_rate, .. } => Some(*learning_rate),
        _ => None,
    });
    let mut charts = vec![
        chart("Loss", "mean over the steps of a line", true, loss),
        chart("Gradient norm", "before clipping", true, norm),
        Chart { smoothing: 0, ..chart("Learning rate", "", false, rate) },
    ];
    charts.extend(monitor_charts(&run.monitor));
    charts
}

fn chart(title: &str, y_label: &str, log_y: bool, curve: Curve) -> Chart {
    Chart {
        title: title.into(),
        x_label: "optimiser steps".into(),
        y_label: y_label.into(),
        log_y,
        smoothing: curve.points.len() / SMOOTHING,
        curves: vec![curve],
    }
}

fn monitor_charts(lines: &[MonitorLine]) -> Vec<Chart> {
    let Some(best) = lines.iter().rfind(|line| line.best).or(lines.first()) else { return Vec::new() };
    let curve = |name: &str, value: &dyn Fn(&MonitorLine) -> f64| Curve {
        name: name.into(),
        points: lines.iter().map(|line| (line.step as f64, value(line))).collect(),
    };
    let title = format!("Held-out prompts: error, best at step {}", best.step);
    let error = curve("paired error", &|line| line.paired_error);
    let ratios = RATIOS.iter().enumerate().map(|(at, (name, _))| curve(name, &|line| line.ratios[at]));
    vec![
        Chart { smoothing: 0, ..chart(&title, "mean squared error of the latents", true, error) },
        Chart {
            smoothing: 0,
            curves: ratios.collect(),
            ..chart("Held-out prompts: look", "student / teacher, 1 is alike", false, curve("", &|_| 1.0))
        },
    ]
}

/// What happened besides training steps, the newest first.
pub(super) fn events(log: &[LogEntry]) -> String {
    let told = log.iter().rev().filter_map(|entry| Some((entry, sentence(&entry.what)?)));
    let mut html = String::new();
    for (entry, sentence) in told.take(MAX_EVENTS) {
        let _ = write!(
            html,
            "<li><span>step {}</span><time data-time=\"{:.0}\"></time><span>{}</span></li>",
            entry.step,
            entry.time,
            escape(&sentence)
        );
    }
    if html.is_empty() {
        "<p class=\"note\">Nothing yet.</p>".into()
    } else {
        format!("<ol class=\"events\">{html}</ol>")
    }
}

fn sentence(what: &Happening) -> Option<String> {
    Some(match what {
        Happening::Started { total_steps, rows, trained_parameters, parameters, version, .. } => format!(
            "started: {total_steps} steps on {rows} rows, {trained_parameters} of {parameters} parameters; {version}"
        ),
        Happening::Message { text } | Happening::Monitor { text, .. } => text.clone(),
        Happening::Checkpoint { path } => format!("checkpoint {path}"),
        Happening::Samples { path } => format!("samples {path}"),
        Happening::Finished { path } => format!("finished: {path}"),
        Happening::Stopped => "stopped".into(),
        Happening::Failed { text } => format!("failed: {text}"),
        Happening::Train { .. } | Happening::Other => return None,
    })
}

/// Keys of a recipe that a person asks for first.
const MAIN_KEYS: [&str; 14] = [
    "task",
    "model",
    "model_id_with_origin_paths",
    "dataset_base_path",
    "lora_base_model",
    "lora_rank",
    "trainable_models",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_schedule",
    "ema_decay",
    "seed",
];

/// The main keys, and the whole file to unfold.
pub(super) fn recipe(text: &str) -> String {
    if text.trim().is_empty() {
        return "<p class=\"note\">No recipe yet.</p>".into();
    }
    let value = |key: &str| {
        let line = |line: &str| line.strip_prefix(key)?.strip_prefix(" = ").map(str::to_owned);
        text.lines().find_map(line)
    };
    let entry = |key: &&str| {
        let value = value(key)?;
        Some(format!("<dt>{key}</dt><dd>{}</dd>", escape(value.trim_matches('"'))))
    };
    let main: String = MAIN_KEYS.iter().filter_map(entry).collect();
    format!(
        "<dl class=\"recipe\">{main}</dl><details><summary>The whole recipe</summary><pre>{}</pre></details>",
        escape(text)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_their_unit() {
        let texts = [0.0, 0.0123456, 0.5, 2.0, 31.25, 1234.5, 1e-4, 2.5e7].map(short);
        assert_eq!(texts, ["0", "0.0123", "0.500", "2.00", "31.2", "1234", "1.00e-4", "2.50e7"]);
        assert_eq!([speed(2.0), speed(0.05)], ["2.00 steps/s", "20.0 s/step"]);
        assert_eq!([memory(300 << 20), memory(3 << 30)], ["300 MiB", "3.00 GiB"]);
    }

    #[test]
    fn text_from_outside_is_escaped_everywhere() {
        let hostile = "<script>alert(1)</script>";
        let failed = Happening::Failed { text: hostile.into() };
        let log = [LogEntry { what: failed, step: 1, time: 1.0 }];
        let html =
            [state(&State::of(&log, 1.0), &log), events(&log), recipe(&format!("task = \"{hostile}\"\n"))];
        for html in html {
            assert!(
                html.contains("&lt;script&gt;alert(1)&lt;/script&gt;") && !html.contains("<script"),
                "{html}"
            );
        }
    }

    #[test]
    fn the_recipe_shows_main_keys_by_whole_name() {
        let html = recipe("# by fewstep\ntask = \"sft\"\nmodel_paths = \"x\"\nseed = 7\n");
        assert!(html.contains("<dt>task</dt><dd>sft</dd>") && html.contains("<dt>seed</dt><dd>7</dd>"));
        assert!(!html.contains("<dt>model</dt>"), "{html}");
        assert!(html.contains("model_paths = &quot;x&quot;"));
    }
}
