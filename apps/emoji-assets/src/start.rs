//! Teaches a text encoder what captions look like before any diffusion: from the states of the template's tokens after
//! the prompt, a linear head has to paint the thumbnail of the caption's picture, each token its square of it.
//!
//! A few thousand captions name each concept a few times. Through noisy pictures a text encoder learns them very
//! slowly; without any, a step costs a fraction and the squares are learned within minutes. The head is thrown away.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use fewstep_data::image::{Picture, Size};
use fewstep_data::metadata::Metadata;
use fewstep_flow::noise::TorchGenerator;
use fewstep_kernels::{AdamW, AdamWStep, Moments};
use fewstep_models::{Condition, Model, ModelSource, WeightType};
use fewstep_train::{LearningRate, Optimizer, Recipe, gradient_norm, recipe::Schedule};

/// The thumbnail is cut into this many squares along one side; each is painted from one token.
const GRID: usize = 4;
/// Side of a square in pixels.
const SQUARE: usize = 8;
/// Side of the thumbnails in pixels.
const SIDE: usize = GRID * SQUARE;
/// Tokens of the template after the prompt that paint a square each; the template's last token does not.
const PAINTERS: usize = GRID * GRID;
/// Numbers of a square.
const PIXELS: usize = 3 * SQUARE * SQUARE;
const BATCH: usize = 64;
const SEED: u64 = 0;

/// Where things are.
pub(crate) struct Folders {
    /// Configs and tokenizer.
    pub(crate) model: PathBuf,
    /// Pictures and captions.
    pub(crate) data_set: PathBuf,
    /// The model to write.
    pub(crate) output: PathBuf,
}

/// Trains the text encoder and writes the model.
pub(crate) fn build(folders: &Folders, steps: u64) -> Result<()> {
    let device = Device::flex();
    let source = ModelSource::from(&folders.model);
    let rows = Captioned::read(folders)?;
    let recipe = recipe();
    let rate = LearningRate::new(&recipe, steps);
    let mut optimizer = Optimizer::new(&recipe);
    let mut model = Model::random(&source, SEED, &device)?.train();
    let mut head = Head::zeros(&model, &device)?;
    let mut generator = TorchGenerator::new(SEED);
    let mut error = 0.0;
    for step in 0..steps {
        let batch = generator.randint(0, rows.captions.len() as i64, BATCH);
        let (captions, thumbnails) = rows.batch(&batch, &device);
        let painted = head.forward(model.encode_prompts(&captions)?);
        let loss = (painted - thumbnails.autodiff()).square().mean();
        error += f64::from(loss.clone().inner().into_scalar::<f32>());
        let mut gradients = loss.backward();
        head.step(&mut gradients, rate.at(step), step + 1);
        let gradients = GradientsParams::from_grads(gradients, &model);
        let norm = gradient_norm(&model, &gradients);
        model = optimizer.step(model, gradients, norm, rate.at(step));
        if (step + 1) % 500 == 0 {
            println!("step {}/{steps}, squared error of thumbnails {:.4}", step + 1, error / 500.0);
            error = 0.0;
        }
    }
    model.valid().save_pretrained(&source, &folders.output, WeightType::F32, &BTreeMap::new())?;
    Ok(())
}

fn recipe() -> Recipe {
    Recipe {
        learning_rate: 2e-3,
        lr_schedule: Schedule::Cosine,
        warmup_steps: 100,
        adam_beta_2: 0.99,
        ..Recipe::default()
    }
}

/// Captions and the thumbnails of their pictures.
struct Captioned {
    captions: Vec<String>,
    /// Pixels in [−1, 1], `PAINTERS · PIXELS` each.
    thumbnails: Vec<Vec<f32>>,
}

impl Captioned {
    fn read(folders: &Folders) -> Result<Self> {
        let metadata = Metadata::read(&folders.data_set.join("metadata.csv"))?;
        let mut read = Self { captions: Vec::new(), thumbnails: Vec::new() };
        for row in metadata.captioned_rows()? {
            let picture = Picture::load(&folders.data_set.join(&row.file))?;
            read.thumbnails.push(squares(&picture));
            read.captions.push(row.prompt);
        }
        Ok(read)
    }

    /// Captions, and thumbnails `[B, PAINTERS, PIXELS]`.
    fn batch(&self, rows: &[i64], device: &Device) -> (Vec<String>, Tensor<3>) {
        let captions = rows.iter().map(|row| self.captions[*row as usize].clone()).collect();
        let pixels = rows.iter().flat_map(|row| self.thumbnails[*row as usize].iter().copied()).collect();
        (captions, Tensor::from_data(TensorData::new(pixels, [rows.len(), PAINTERS, PIXELS]), device))
    }
}

/// The squares of a picture's thumbnail, row by row.
fn squares(picture: &Picture) -> Vec<f32> {
    let pixels = picture.crop_and_resize(Size { height: SIDE, width: SIDE }).to_pixels();
    let mut squares = Vec::with_capacity(pixels.len());
    for painter in 0..PAINTERS {
        let [top, left] = [painter / GRID * SQUARE, painter % GRID * SQUARE];
        for colour in 0..3 {
            for row in top..top + SQUARE {
                let start = (colour * SIDE + row) * SIDE + left;
                squares.extend_from_slice(&pixels[start..start + SQUARE]);
            }
        }
    }
    squares
}

/// Paints squares from the states of the tokens after the prompt, all with the same weight.
struct Head {
    /// `[J, PIXELS]`.
    weight: Tensor<2>,
    moments: Moments,
}

impl Head {
    fn zeros(model: &Model, device: &Device) -> Result<Self> {
        let width = model.encode_prompts(&[String::new()])?.text.dims()[2];
        let weight = Tensor::zeros([width, PIXELS], device).autodiff().require_grad();
        Ok(Self { weight, moments: Moments::zeros(width * PIXELS) })
    }

    /// `[B, PAINTERS, PIXELS]`.
    fn forward(&self, condition: Condition) -> Tensor<3> {
        let [batch, tokens, width] = condition.text.dims();
        let first = |(row, length): (usize, &usize)| row * tokens + length - 1 - PAINTERS;
        let starts = condition.lengths.iter().enumerate().map(first);
        let painters: Vec<i64> =
            starts.flat_map(|start| (start..start + PAINTERS).map(|at| at as i64)).collect();
        let painters =
            Tensor::<1, Int>::from_data(TensorData::new(painters, [batch * PAINTERS]), &self.weight.device());
        let states = condition.text.reshape([batch * tokens, width]).select(0, painters);
        states.matmul(self.weight.clone()).reshape([batch, PAINTERS, PIXELS])
    }

    fn step(&mut self, gradients: &mut burn::tensor::Gradients, learning_rate: f64, step: u64) {
        let adamw = AdamW { beta_1: 0.9, beta_2: 0.99, epsilon: 1e-8, weight_decay: 0.0 };
        let gradient = self.weight.grad_remove(gradients).expect("the loss depends on the head");
        let at = AdamWStep { learning_rate, gradient_scale: 1.0, step };
        let weight = self.weight.clone().inner();
        self.weight = adamw.step(weight, gradient, &mut self.moments, at).autodiff().require_grad();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fewstep_models::qwen_image::PromptTokenizer;

    use super::*;

    #[test]
    fn the_template_has_one_token_for_each_square_and_then_its_end() {
        let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/teacher");
        let tokenizer = PromptTokenizer::read(&ModelSource::from(&teacher), 95).unwrap();
        let tokens = tokenizer.encode(&["red apple".into(), "dog".into()]).unwrap().ids;
        let painters = |ids: &[u32]| ids[ids.len() - 1 - PAINTERS..].to_vec();
        assert_eq!(painters(&tokens[0]), painters(&tokens[1]));
        let mut distinct = painters(&tokens[0])[..PAINTERS].to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), PAINTERS);
        let before = |ids: &[u32]| ids[ids.len() - 2 - PAINTERS];
        assert_ne!(before(&tokens[0]), before(&tokens[1]), "the prompt ends where the painters begin");
    }

    #[test]
    fn squares_are_cut_row_by_row_and_hold_one_colour_after_the_other() {
        // Green, but for one red pixel in the fourth column of squares and the second row of them.
        let mut rgb = [0, 255, 0].repeat(SIDE * SIDE);
        let (row, column) = (SQUARE + 2, 3 * SQUARE + 5);
        rgb[3 * (row * SIDE + column)..][..3].copy_from_slice(&[255, 0, 0]);
        let found = squares(&Picture { width: SIDE, height: SIDE, rgb });
        let red = (GRID + 3) * PIXELS + 2 * SQUARE + 5;
        for (at, value) in found.iter().enumerate() {
            let green = at / (SQUARE * SQUARE) % 3 == 1;
            let expected = match at {
                _ if at == red => 1.0,
                _ if at == red + SQUARE * SQUARE => -1.0,
                _ if green => 1.0,
                _ => -1.0,
            };
            assert_eq!(*value, expected, "number {at}");
        }
    }
}
