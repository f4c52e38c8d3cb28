//! Our side of compare.py for work that no subcommand does: a plain double-stream transformer built of the kernels, and
//! the autoencoder. Weights and inputs are those that `peer.py export` wrote.
//!
//! `ours WORK DIR STEPS WARMUP` with WORK one of mmdit-train, mmdit-forward, vae-encode, vae-decode; prints JSON.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use fewstep_kernels::{
    AdamW, AdamWStep, AttentionOptions, Gelu, Modulation, Moments, Projection, QkvStream, RotaryTable,
    TunedAllocator, attention, gated_residual, gelu, joint_qkv, linear, norm_modulate, split_tokens,
};
use fewstep_models::qwen_image::Vae;
use fewstep_models::{ModelSource, WeightFiles};

#[global_allocator]
static ALLOCATOR: TunedAllocator = TunedAllocator;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [work, folder, steps, warmup] = &arguments[..] else { bail!("ours WORK DIR STEPS WARMUP") };
    let (folder, runs) = (PathBuf::from(folder), Runs { steps: steps.parse()?, warmup: warmup.parse()? });
    match work.as_str() {
        "mmdit-train" => train(&folder, runs),
        "mmdit-forward" => forward(&folder, runs),
        "vae-encode" => autoencode(&folder, runs, "pixels", Vae::encode),
        "vae-decode" => autoencode(&folder, runs, "latents", Vae::decode),
        other => bail!("no work is called {other}"),
    }
}

/// How often the work is done.
#[derive(Clone, Copy)]
struct Runs {
    steps: usize,
    warmup: usize,
}

impl Runs {
    /// Times `work`, which gives a number to compare; prints all of it.
    fn measure(self, mut work: impl FnMut() -> f64) -> Result<()> {
        let (mut secs, mut numbers) = (Vec::new(), Vec::new());
        for _ in 0..self.warmup + self.steps {
            let start = Instant::now();
            numbers.push(work());
            secs.push(start.elapsed().as_secs_f64());
        }
        println!("{}", serde_json::json!({"secs": secs[self.warmup..], "losses": numbers}));
        Ok(())
    }
}

/// Named tensors of a file.
struct Tensors(WeightFiles);

impl Tensors {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self(WeightFiles::open(path)?))
    }

    fn get<const D: usize>(&self, key: &str) -> Result<Tensor<D>> {
        let (shape, values) = self.0.read(key)?;
        let shape: [usize; D] = shape.try_into().ok().with_context(|| format!("axes of {key}"))?;
        Ok(Tensor::from_data(TensorData::new(values, shape), &Device::flex()))
    }
}

fn autoencode(folder: &Path, runs: Runs, key: &str, code: fn(&Vae, Tensor<4>) -> Tensor<4>) -> Result<()> {
    let vae = Vae::from_pretrained(&ModelSource::from(folder), &Device::flex())?;
    let input: Tensor<4> = Tensors::open(&folder.join("vae_inputs.safetensors"))?.get(key)?;
    runs.measure(|| {
        let values = code(&vae, input.clone()).into_data().try_to_vec::<f32>().expect("pixels are f32");
        let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
        (squares / values.len() as f64).sqrt()
    })
}

const HEADS: usize = 6;
const EPSILON: f32 = 1e-6;

#[derive(Module, Debug)]
struct Dense {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

/// One stream of a block.
#[derive(Module, Debug)]
struct Stream {
    modulation: Dense,
    qkv: Dense,
    norm_q: Param<Tensor<1>>,
    norm_k: Param<Tensor<1>>,
    proj: Dense,
    up: Dense,
    down: Dense,
}

#[derive(Module, Debug)]
struct Block {
    image: Stream,
    text: Stream,
}

/// peer.py's transformer of this name.
#[derive(Module, Debug)]
struct Mmdit {
    image_in: Dense,
    text_in: Dense,
    time_1: Dense,
    time_2: Dense,
    blocks: Vec<Block>,
    norm_out: Dense,
    out: Dense,
}

struct Inputs {
    image: Tensor<3>,
    text: Tensor<3>,
    time: Tensor<2>,
    target: Tensor<3>,
    rotary: RotaryTable,
}

impl Dense {
    fn load(file: &Tensors, name: &str) -> Result<Self> {
        let (weight, bias) = (file.get(&format!("{name}.weight"))?, file.get(&format!("{name}.bias"))?);
        Ok(Self { weight: Param::from_tensor(weight), bias: Param::from_tensor(bias) })
    }

    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = (self.weight.val(), Some(self.bias.val()));
        linear(x, Projection { weight, rounded_to: None, bias, low_rank: None })
    }
}

impl Stream {
    fn load(file: &Tensors, name: &str) -> Result<Self> {
        let dense = |part: &str| Dense::load(file, &format!("{name}.{part}"));
        let norm = |part: &str| file.get(&format!("{name}.{part}")).map(Param::from_tensor);
        Ok(Self {
            modulation: dense("mod")?,
            qkv: dense("qkv")?,
            norm_q: norm("norm_q")?,
            norm_k: norm("norm_k")?,
            proj: dense("proj")?,
            up: dense("up")?,
            down: dense("down")?,
        })
    }

    fn before(&self, x: Tensor<3>, modulation: Tensor<2>) -> QkvStream {
        let normed = norm_modulate(x, modulation, Modulation { shift: 0, scale: 1 }, EPSILON);
        QkvStream { qkv: self.qkv.forward(normed), norm_q: self.norm_q.val(), norm_k: self.norm_k.val() }
    }

    fn after(&self, x: Tensor<3>, attended: Tensor<3>, modulation: Tensor<2>) -> Tensor<3> {
        let x = gated_residual(x, self.proj.forward(attended), modulation.clone(), 2);
        let normed = norm_modulate(x.clone(), modulation.clone(), Modulation { shift: 3, scale: 4 }, EPSILON);
        let hidden = gelu(self.up.forward(normed), Gelu::Tanh);
        gated_residual(x, self.down.forward(hidden), modulation, 5)
    }
}

impl Block {
    fn forward(
        &self,
        [image, text]: [Tensor<3>; 2],
        time: &Tensor<2>,
        rotary: &RotaryTable,
    ) -> [Tensor<3>; 2] {
        let (images, texts) = (image.dims()[1], text.dims()[1]);
        let modulations = [&self.image, &self.text].map(|stream| stream.modulation.forward(time.clone()));
        let [by_image, by_text] = modulations;
        let (image_qkv, text_qkv) = (
            self.image.before(image.clone(), by_image.clone()),
            self.text.before(text.clone(), by_text.clone()),
        );
        let qkv = joint_qkv(text_qkv, image_qkv, HEADS, rotary, EPSILON);
        let joint = attention(qkv, AttentionOptions::default());
        let attended_text = split_tokens(joint.clone(), 0..texts);
        let attended_image = split_tokens(joint, texts..texts + images);
        [self.image.after(image, attended_image, by_image), self.text.after(text, attended_text, by_text)]
    }
}

impl Mmdit {
    fn load(file: &Tensors) -> Result<Self> {
        let dense = |name: &str| Dense::load(file, name);
        let block = |index: usize| -> Result<Block> {
            let stream = |name: &str| Stream::load(file, &format!("blocks.{index}.{name}"));
            Ok(Block { image: stream("image")?, text: stream("text")? })
        };
        Ok(Self {
            image_in: dense("image_in")?,
            text_in: dense("text_in")?,
            time_1: dense("time_1")?,
            time_2: dense("time_2")?,
            blocks: (0..6).map(block).collect::<Result<_>>()?,
            norm_out: dense("norm_out")?,
            out: dense("out")?,
        })
    }

    fn loss(&self, inputs: &Inputs) -> Tensor<1> {
        let autodiff = self.out.bias.val().device().is_autodiff();
        let place = |x: &Tensor<3>| if autodiff { x.clone().autodiff() } else { x.clone() };
        let time = if autodiff { inputs.time.clone().autodiff() } else { inputs.time.clone() };
        let time = silu(self.time_2.forward(silu(self.time_1.forward(time))));
        let start = [self.image_in.forward(place(&inputs.image)), self.text_in.forward(place(&inputs.text))];
        let [image, _] =
            self.blocks.iter().fold(start, |streams, block| block.forward(streams, &time, &inputs.rotary));
        let modulation = self.norm_out.forward(time);
        let output =
            self.out.forward(norm_modulate(image, modulation, Modulation { shift: 0, scale: 1 }, EPSILON));
        (output - place(&inputs.target)).square().mean()
    }
}

impl Inputs {
    fn load(path: &Path) -> Result<Self> {
        let file = Tensors::open(path)?;
        let (shape, cos) = file.0.read("cos")?;
        let (_, sin) = file.0.read("sin")?;
        Ok(Self {
            image: file.get("image")?,
            text: file.get("text")?,
            time: file.get("time")?,
            target: file.get("target")?,
            rotary: RotaryTable::new(cos, sin, shape[1]),
        })
    }
}

fn load(folder: &Path) -> Result<(Mmdit, Inputs)> {
    let model = Mmdit::load(&Tensors::open(&folder.join("mmdit.safetensors"))?)?;
    Ok((model, Inputs::load(&folder.join("mmdit_inputs.safetensors"))?))
}

fn forward(folder: &Path, runs: Runs) -> Result<()> {
    let (model, inputs) = load(folder)?;
    runs.measure(|| model.loss(&inputs).into_scalar::<f32>().into())
}

fn train(folder: &Path, runs: Runs) -> Result<()> {
    let (model, inputs) = load(folder)?;
    let mut model = Some(model.train());
    let mut optimizer = Optimizer::default();
    runs.measure(|| {
        let current = model.take().expect("put back below");
        let loss = current.loss(&inputs);
        let gradients = loss.backward();
        model = Some(optimizer.step(current, gradients));
        loss.inner().into_scalar::<f32>().into()
    })
}

/// AdamW over every parameter that has a gradient.
#[derive(Default)]
struct Optimizer {
    moments: HashMap<ParamId, Moments>,
    steps: u64,
}

impl Optimizer {
    fn step(&mut self, model: Mmdit, mut gradients: Gradients) -> Mmdit {
        self.steps += 1;
        let mut taken = Taken { gradients: &mut gradients, found: HashMap::new() };
        model.visit(&mut taken);
        let found = taken.found;
        model.map(&mut Update { optimizer: self, gradients: found })
    }
}

/// Gradients by parameter, flattened.
struct Taken<'a> {
    gradients: &'a mut Gradients,
    found: HashMap<ParamId, Tensor<1>>,
}

impl ModuleVisitor for Taken<'_> {
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        if let Some(gradient) = parameter.val().grad_remove(self.gradients) {
            self.found.insert(parameter.id, gradient.flatten(0, D - 1));
        }
    }
}

struct Update<'a> {
    optimizer: &'a mut Optimizer,
    gradients: HashMap<ParamId, Tensor<1>>,
}

impl ModuleMapper for Update<'_> {
    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradients.remove(&parameter.id) else { return parameter };
        let (id, value, mapper) = parameter.consume();
        let value = value.inner();
        let (shape, elements) = (value.dims(), value.dims().iter().product());
        let moments = self.optimizer.moments.entry(id).or_insert_with(|| Moments::zeros(elements));
        let at = AdamWStep { learning_rate: 1e-4, gradient_scale: 1.0, step: self.optimizer.steps };
        let value = AdamW::default().step(value, gradient.reshape(shape), moments, at);
        Param::from_mapped_value(id, value.autodiff().require_grad(), mapper)
    }
}
