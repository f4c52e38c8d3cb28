//! What the page's script is given: parts of the page as HTML, and the pictures as data.

use std::path::Path;

use serde::Serialize;

use super::embed::Embedded;
use super::samples::{SAMPLES_FOLDER, SampleSet, TEACHER, picture_file, step_folder};
use super::state::State;
use super::{Run, fragments};
use crate::charts::{Chart, Curve, thinned};
use crate::html::figure;

/// Everything that changes on the page of a run.
#[derive(Debug, Serialize)]
pub struct View {
    /// Whether there is a server to ask for news.
    live: bool,
    /// The run's name.
    pub(super) name: String,
    /// Status and numbers, as HTML.
    state: String,
    charts: Vec<ChartView>,
    /// What happened, as HTML.
    events: String,
    /// The recipe, as HTML.
    recipe: String,
    /// When the log last grew, in Unix seconds.
    last_time: Option<f64>,
    samples: SamplesView,
}

/// A chart, and its numbers for reading off.
#[derive(Debug, Serialize)]
struct ChartView {
    html: String,
    curves: Vec<Curve>,
}

#[derive(Debug, Serialize)]
struct SamplesView {
    teacher: Option<SetView>,
    steps: Vec<SetView>,
    /// Drawings that the page leaves out to stay small.
    left_out: usize,
}

#[derive(Debug, Serialize)]
struct SetView {
    name: String,
    settings: String,
    width: usize,
    height: usize,
    pictures: Vec<PictureView>,
}

#[derive(Debug, Serialize)]
struct PictureView {
    prompt: String,
    seed: u64,
    src: String,
}

impl View {
    /// A view whose pictures are asked for one by one, under the paths they have in the run's folder.
    pub fn live(run: &Run, now: f64) -> Self {
        let src = |set: &str, index: usize| Some(format!("{SAMPLES_FOLDER}/{set}/{}", picture_file(index)));
        let steps = run.samples.steps.iter().collect();
        Self { live: true, ..Self::of(run, now, samples(run, steps, src)) }
    }

    /// A view with its pictures inside; of many drawings some are left out, and large pictures are made smaller.
    pub(super) fn alone(run: &Run, folder: &Path, now: f64) -> Self {
        let embedded = Embedded::new(folder, &run.samples);
        let src = |set: &str, index: usize| embedded.picture(set, index);
        let steps = embedded.chosen(&run.samples.steps);
        Self::of(run, now, samples(run, steps, src))
    }

    fn of(run: &Run, now: f64, samples: SamplesView) -> Self {
        let state = State::of(&run.log, now);
        Self {
            live: false,
            name: run.name.clone(),
            state: fragments::state(&state, &run.log),
            charts: fragments::charts(run).iter().filter_map(chart).collect(),
            events: fragments::events(&run.log),
            recipe: fragments::recipe(&run.recipe),
            last_time: state.last_time,
            samples,
        }
    }

    /// The view as JSON, in which no text can end a script element.
    pub fn to_json(&self) -> String {
        let json = serde_json::to_string(self).expect("strings, numbers and lists always have a JSON form");
        json.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
    }
}

fn chart(chart: &Chart) -> Option<ChartView> {
    let html = figure(chart);
    let curve = |curve: &Curve| Curve { name: curve.name.clone(), points: thinned(&curve.points) };
    (!html.is_empty()).then(|| ChartView { html, curves: chart.curves.iter().map(curve).collect() })
}

/// The drawings with the sources of their pictures; a picture without one is left out.
fn samples(
    run: &Run,
    steps: Vec<&(u64, SampleSet)>,
    src: impl Fn(&str, usize) -> Option<String>,
) -> SamplesView {
    let set = |folder: &str, name: String, set: &SampleSet| SetView {
        name,
        settings: settings(set),
        width: set.width,
        height: set.height,
        pictures: set
            .samples
            .iter()
            .enumerate()
            .filter_map(|(index, sample)| {
                Some(PictureView {
                    prompt: sample.prompt.clone(),
                    seed: sample.seed,
                    src: src(folder, index)?,
                })
            })
            .collect(),
    };
    SamplesView {
        teacher: run.samples.teacher.as_ref().map(|teacher| set(TEACHER, TEACHER.into(), teacher)),
        left_out: run.samples.steps.len() - steps.len(),
        steps: steps
            .into_iter()
            .map(|(step, drawn)| set(&step_folder(*step), format!("step {step}"), drawn))
            .collect(),
    }
}

fn settings(set: &SampleSet) -> String {
    let steps = if set.num_inference_steps == 1 { "step" } else { "steps" };
    match set.cfg_scale {
        1.0 => format!("{} {steps} without guidance", set.num_inference_steps),
        scale => format!("{} {steps} with guidance {scale}", set.num_inference_steps),
    }
}
