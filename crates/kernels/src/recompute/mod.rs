//! Gradient checkpointing (arXiv 1604.06174): a part of a network as one node of the autodiff graph that keeps its inputs
//! and runs again when its gradient is asked for. On the CPU, the results inside that are dear to compute
//! ([`computed_once`]) are kept as well, and taken over by the second run ([`results`]).

mod results;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::autodiff::{Autodiff, NodeId};
use burn::backend::{Backend, DispatchKindConversion, DispatchTensor, Flex};
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use crate::extension::{Values, graph_tensor, in_host_memory, plain_tensor};
use crate::gradient_sums::{handed_over, tensor_added_to_sum};
use crate::inject;
use crate::twins::takes_plain_twins;
pub use results::Remembered;
pub(crate) use results::{Price, computed_once};

/// `forward(module, inputs)`, whose inside is computed once more in the backward pass instead of being kept: all but, on
/// the CPU, the outputs of attention and of linear layers.
///
/// Values and gradients are those of calling `forward`, the gradients of the module's parameters included. What else
/// `forward` holds must not learn, and it must do the same operations each time. Inside of another recomputed part, and
/// of [`crate::with_plain_twins`], it is called as it is.
///
/// # Shapes
/// Any of three axes.
pub fn recomputed<M, F, const N: usize>(module: &M, inputs: [Tensor<3>; N], forward: F) -> Tensor<3>
where
    M: Module + 'static,
    F: Fn(&M, [Tensor<3>; N]) -> Tensor<3> + Send + Sync + 'static,
{
    let [output] = recomputed_outputs(module, inputs, move |module, inputs| [forward(module, inputs)]);
    output
}

/// [`recomputed`] of a part with `K` outputs.
pub fn recomputed_outputs<M, F, const N: usize, const K: usize>(
    module: &M,
    inputs: [Tensor<3>; N],
    forward: F,
) -> [Tensor<3>; K]
where
    M: Module + 'static,
    F: Fn(&M, [Tensor<3>; N]) -> [Tensor<3>; K] + Send + Sync + 'static,
{
    if !inputs[0].device().is_autodiff() || takes_plain_twins() || results::in_part() {
        return forward(module, inputs);
    }
    if in_host_memory(&inputs[0]) {
        return recomputed_on::<Flex, M, F, N, K>(module, inputs, forward);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    return recomputed_on::<burn::backend::Cube, M, F, N, K>(module, inputs, forward);
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    forward(module, inputs)
}

/// [`recomputed_outputs`] on the autodiff side of a backend.
///
/// burn's nodes have one output. That of the part's node stands for all of the part's; each of these comes from a node after
/// it, which leaves its gradient where the part's node finds it.
fn recomputed_on<B, M, F, const N: usize, const K: usize>(
    module: &M,
    mut inputs: [Tensor<3>; N],
    forward: F,
) -> [Tensor<3>; K]
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
    M: Module + 'static,
    F: Fn(&M, [Tensor<3>; N]) -> [Tensor<3>; K] + Send + Sync + 'static,
{
    let parameters = Learning::<B>::of(module);
    if !inputs.iter().any(Tensor::is_tracked) {
        if parameters.nodes.is_empty() {
            return forward(module, inputs);
        }
        // No backward pass would come by for the parameters without a tracked parent.
        inputs[0] = inputs[0].clone().require_grad();
    }
    let module = module.valid();
    let (outputs, kept) = results::first_run(|| forward(&module, inputs.clone().map(Tensor::inner)));
    let nodes = inputs.each_ref().map(|input| graph_tensor::<B, 3>(input.clone()).node());
    let inputs = inputs.map(Tensor::inner);
    let cotangents = outputs.each_ref().map(|_| Cotangent::default());
    let stand_in = Tensor::<1>::zeros([1], &outputs[0].device());
    let (handed, forward) = (cotangents.clone(), Arc::new(forward));
    let state = State { module, inputs, kept, parameters, cotangents: handed, forward };
    let part = Recomputed::<M, F, K>(PhantomData).prepare::<NoCheckpointing>(nodes);
    let OpsKind::Tracked(part) = part.compute_bound().stateful() else { unreachable!("an input is tracked") };
    let part = part.finish(state, plain_tensor::<B, 1>(stand_in.clone()));
    let mut cotangents = cotangents.into_iter();
    outputs.map(|output| {
        let cotangent = cotangents.next().expect("one for each output");
        let state = Handed { cotangent, stand_in: stand_in.clone() };
        let node = PartOutput.prepare::<NoCheckpointing>([part.node()]).compute_bound().stateful();
        let OpsKind::Tracked(node) = node else { unreachable!("the part is tracked") };
        Tensor::from_primitive::<Autodiff<B>>(node.finish(state, plain_tensor::<B, 3>(output)))
    })
}

/// The gradient of one of a part's outputs on its way to the part's node; `None` where nobody reads the output.
type Cotangent = Arc<Mutex<Option<Tensor<3>>>>;

/// The node of one of a part's outputs.
#[derive(Debug)]
struct PartOutput;

#[derive(Clone, Debug)]
struct Handed {
    cotangent: Cotangent,
    /// The gradient of the output of the part's own node.
    stand_in: Tensor<1>,
}

impl<B> Backward<B, 1> for PartOutput
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = Handed;

    fn backward(self, operation: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = Tensor::from_primitive::<B>(gradients.consume::<B>(&operation.node));
        let Handed { cotangent, stand_in } = operation.state;
        *cotangent.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
        for parent in operation.parents.into_iter().flatten() {
            gradients.register::<B>(parent.id, plain_tensor::<B, 1>(stand_in.clone()));
        }
    }
}

/// The nodes of a module's parameters that have a gradient.
struct Learning<B> {
    nodes: HashMap<ParamId, NodeId>,
    backend: PhantomData<fn(B)>,
}

impl<B> Learning<B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    fn of(module: &impl Module) -> Self {
        let mut found = Self { nodes: HashMap::new(), backend: PhantomData };
        module.visit(&mut found);
        found
    }

    /// Each parameter's node in here and in there.
    fn beside(&self, other: &Self) -> Vec<(NodeId, NodeId)> {
        self.nodes.iter().filter_map(|(id, node)| Some((*node, *other.nodes.get(id)?))).collect()
    }
}

impl<B> Clone for Learning<B> {
    fn clone(&self) -> Self {
        Self { nodes: self.nodes.clone(), backend: PhantomData }
    }
}

impl<B> ModuleVisitor for Learning<B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        if parameter.is_require_grad() {
            self.nodes.insert(parameter.id, graph_tensor::<B, D>(parameter.val()).node().id());
        }
    }
}

/// The node of a part of a network: what it is made of stands in its [`State`].
struct Recomputed<M, F, const K: usize>(PhantomData<fn(M, F)>);

impl<M, F, const K: usize> fmt::Debug for Recomputed<M, F, K> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("recomputed part")
    }
}

struct State<B, M, F, const N: usize, const K: usize> {
    /// On the plain side, as the inputs.
    module: M,
    inputs: [Tensor<3>; N],
    /// From the first run.
    kept: VecDeque<Values>,
    parameters: Learning<B>,
    cotangents: [Cotangent; K],
    forward: Arc<F>,
}

impl<B, M: Clone, F, const N: usize, const K: usize> Clone for State<B, M, F, N, K> {
    fn clone(&self) -> Self {
        let Self { module, inputs, kept, parameters, cotangents, forward } = self;
        Self {
            module: module.clone(),
            inputs: inputs.clone(),
            kept: kept.clone(),
            parameters: parameters.clone(),
            cotangents: cotangents.clone(),
            forward: forward.clone(),
        }
    }
}

impl<B, M, F, const N: usize, const K: usize> fmt::Debug for State<B, M, F, N, K> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("inputs of a recomputed part")
    }
}

impl<B, M, F, const N: usize, const K: usize> Backward<B, N> for Recomputed<M, F, K>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
    M: Module + 'static,
    F: Fn(&M, [Tensor<3>; N]) -> [Tensor<3>; K] + Send + Sync + 'static,
{
    type State = State<B, M, F, N, K>;

    /// The graph in here has leaves of its own and shares no node with the one outside, whose lock is held meanwhile.
    fn backward(self, operation: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        gradients.consume::<B>(&operation.node);
        let State { module, inputs, kept, parameters, cotangents, forward } = operation.state;
        let module = module.train();
        let mut parents = operation.parents.iter();
        let inputs = inputs.map(|input| {
            let input = input.autodiff();
            let tracked = parents.next().is_some_and(Option::is_some);
            if tracked { input.require_grad() } else { input }
        });
        let outputs = results::second_run(kept, || forward(&module, inputs.clone()));
        let sums = parameters.beside(&Learning::<B>::of(&module));
        let cotangents =
            cotangents.map(|cotangent| cotangent.lock().unwrap_or_else(PoisonError::into_inner).take());
        let losses = outputs
            .into_iter()
            .zip(cotangents)
            .filter_map(|(output, cotangent)| Some(inject(output, cotangent?)));
        let loss = losses.reduce(|sum, loss| sum + loss).expect("a gradient came by an output");
        let mut inner = handed_over(&sums, || loss.backward());
        for (input, parent) in inputs.into_iter().zip(operation.parents) {
            let Some(parent) = parent else { continue };
            let gradient = input.grad_remove(&mut inner).unwrap_or_else(|| input.inner().zeros_like());
            gradients.register::<B>(parent.id, plain_tensor::<B, 3>(gradient));
        }
        module.visit(&mut HandOver { parameters, inner, gradients });
    }
}

/// Moves the parameters' gradients from the graph inside to the one outside.
struct HandOver<'a, B> {
    parameters: Learning<B>,
    inner: burn::tensor::Gradients,
    gradients: &'a mut Gradients,
}

impl<B> ModuleVisitor for HandOver<'_, B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        let Some(node) = self.parameters.nodes.get(&parameter.id) else { return };
        let gradient = parameter.val().grad_remove(&mut self.inner);
        if let Some(gradient) = gradient.and_then(|gradient| tensor_added_to_sum(*node, gradient)) {
            self.gradients.register::<B>(*node, plain_tensor::<B, D>(gradient));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gelu, Projection, gelu, linear, with_plain_twins};
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, random, values};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    const WIDTH: usize = 6;

    /// gelu(x up) down + y, and a parameter that nothing reads.
    #[derive(Module, Debug)]
    struct Part {
        up: Param<Tensor<2>>,
        down: Param<Tensor<2>>,
        unread: Param<Tensor<2>>,
    }

    impl Part {
        fn new(seed: u64, device: &Device) -> Self {
            let weight = |seed| Param::from_tensor(random([WIDTH, WIDTH], seed, device));
            Self { up: weight(seed), down: weight(seed + 1), unread: weight(seed + 2) }
        }

        fn forward(&self, [x, y]: [Tensor<3>; 2]) -> Tensor<3> {
            let project = |x, weight: &Param<Tensor<2>>| {
                linear(x, Projection { weight: weight.val(), rounded_to: None, bias: None, low_rank: None })
            };
            project(gelu(project(x, &self.up), Gelu::Tanh), &self.down) + y
        }
    }

    type Call = fn(&Part, [Tensor<3>; 2]) -> Tensor<3>;
    const KEPT: Call = |part, inputs| part.forward(inputs);
    const RECOMPUTED: Call = |part, inputs| recomputed(part, inputs, Part::forward);

    /// Which of the first part's weights and of the inputs have a gradient.
    #[derive(Clone, Copy)]
    struct Tracked {
        up: bool,
        down: bool,
        x: bool,
        y: bool,
    }

    /// Those of the build.
    fn devices() -> Vec<Device> {
        vec![
            Device::flex(),
            #[cfg(feature = "wgpu")]
            Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        ]
    }

    /// The output of one part after the other, both used twice, and all gradients.
    fn run(call: Call, tracked: Tracked, device: &Device) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
        let mut first = Part::new(1, device);
        first.up = first.up.set_require_grad(tracked.up);
        first.down = first.down.set_require_grad(tracked.down);
        let parts = [first.train(), Part::new(5, device).set_require_grad(false).train()];
        let input = |seed, tracked| {
            let input = random::<3>([2, 3, WIDTH], seed, device).autodiff();
            if tracked { input.require_grad() } else { input }
        };
        let (x, y) = (input(20, tracked.x), input(21, tracked.y));
        let mut hidden = x.clone();
        for part in parts.iter().chain(&parts) {
            hidden = call(part, [hidden, y.clone()]);
        }
        let cotangent = random([2, 3, WIDTH], 22, device);
        let gradients = inject(hidden.clone(), cotangent).backward();
        let weights = parts.iter().flat_map(|part| [&part.up, &part.down, &part.unread]);
        let weights = weights.map(|weight| weight.val().grad(&gradients).map(values));
        let inputs = [(x, tracked.x), (y, tracked.y)];
        let inputs = inputs.map(|(x, tracked)| tracked.then(|| values(x.grad(&gradients).unwrap())));
        (values(hidden), weights.chain(inputs).collect())
    }

    #[test]
    fn a_recomputed_part_equals_one_that_is_kept_whatever_has_a_gradient() {
        for (device, bits) in devices().iter().flat_map(|device| (1..16).map(move |bits| (device, bits))) {
            let bit = |index: usize| bits >> index & 1 == 1;
            let tracked = Tracked { up: bit(0), down: bit(1), x: bit(2), y: bit(3) };
            let [(output, gradients), (kept, expected)] =
                [RECOMPUTED, KEPT].map(|call| run(call, tracked, device));
            assert_eq!(output, kept);
            for (index, pair) in gradients.iter().zip(&expected).enumerate() {
                match pair {
                    // The same sums in another order.
                    (Some(found), Some(expected)) => assert_close(found, expected, 1e-4),
                    (None, None) => {}
                    _ => panic!("tracked {bits:b}: only one has gradient {index}"),
                }
            }
            assert_eq!(gradients[0].is_some(), tracked.up);
            assert!(gradients[2].is_none(), "a parameter that nothing reads has no gradient");
        }
    }

    #[test]
    fn gradients_come_by_every_output_that_is_read() {
        let both = |part: &Part, [x, y]: [Tensor<3>; 2]| {
            let first = part.forward([x, y.clone()]);
            [first.clone(), first * y]
        };
        type Outputs = [Tensor<3>; 2];
        for (device, read) in
            devices().iter().flat_map(|device| [[1, 0], [0, 1], [1, 2]].map(|read| (device, read)))
        {
            let run = |call: &dyn Fn(&Part, Outputs) -> Outputs| {
                let part = Part::new(1, device).train();
                let x = random::<3>([2, 3, WIDTH], 20, device).autodiff().require_grad();
                let outputs = call(&part, [x.clone(), random([2, 3, WIDTH], 21, device).autodiff()]);
                // An output that is read twice, or not at all.
                let cotangents = (0..).map(|seed| random::<3>([2, 3, WIDTH], 30 + seed, device));
                let times = outputs.iter().zip(read).flat_map(|(output, times)| vec![output.clone(); times]);
                let losses = times.zip(cotangents).map(|(output, cotangent)| inject(output, cotangent));
                let gradients = losses.reduce(|sum, loss| sum + loss).unwrap().backward();
                [x.grad(&gradients).map(values), part.up.val().grad(&gradients).map(values)]
                    .map(Option::unwrap)
            };
            let found = run(&|part, inputs| recomputed_outputs(part, inputs, both));
            for (found, expected) in found.iter().zip(run(&both)) {
                assert_close(found, &expected, 1e-4);
            }
        }
    }

    #[test]
    fn the_inside_runs_twice_on_every_device_and_once_among_twins() {
        for device in devices() {
            let runs = || {
                let runs = Arc::new(AtomicUsize::new(0));
                let counted = {
                    let runs = Arc::clone(&runs);
                    move |part: &Part, inputs: [Tensor<3>; 2]| {
                        runs.fetch_add(1, Ordering::Relaxed);
                        part.forward(inputs)
                    }
                };
                let x = random::<3>([2, 3, WIDTH], 20, &device).autodiff().require_grad();
                recomputed(&Part::new(1, &device).train(), [x.clone(), x], counted).sum().backward();
                runs.load(Ordering::Relaxed)
            };
            assert_eq!((runs(), with_plain_twins(runs)), (2, 1));
        }
    }

    #[test]
    fn a_result_that_is_computed_once_is_taken_over_by_the_second_run() {
        for count in [1, 3] {
            let runs = Arc::new(AtomicUsize::new(0));
            let counted = {
                let runs = Arc::clone(&runs);
                move |part: &Part, inputs: [Tensor<3>; 2]| {
                    for _ in 0..count {
                        computed_once(Price::Usual, || {
                            runs.fetch_add(1, Ordering::Relaxed);
                            [Values::from_vec(vec![0.0], &[1])]
                        });
                    }
                    part.forward(inputs)
                }
            };
            let x = random::<3>([2, 3, WIDTH], 20, &Device::flex()).autodiff().require_grad();
            let output = recomputed(&Part::new(1, &Device::flex()).train(), [x.clone(), x.clone()], counted);
            let gradients = output.sum().backward();
            assert!(x.grad(&gradients).is_some());
            assert_eq!(runs.load(Ordering::Relaxed), count);
        }
    }

    #[test]
    #[should_panic(expected = "what is computed again does the same operations")]
    fn a_second_run_that_does_less_is_found_out() {
        let first = AtomicBool::new(true);
        let forgetful = move |part: &Part, inputs: [Tensor<3>; 2]| {
            let output = part.forward(inputs);
            if first.swap(false, Ordering::Relaxed) {
                computed_once(Price::Usual, || [Values::from_vec(vec![0.0], &[1])]);
            }
            output
        };
        let x = random::<3>([2, 3, WIDTH], 20, &Device::flex()).autodiff().require_grad();
        recomputed(&Part::new(1, &Device::flex()).train(), [x.clone(), x], forgetful).sum().backward();
    }

    #[test]
    fn nothing_is_recorded_without_a_graph() {
        let part = Part::new(1, &Device::flex());
        let inputs = || [20, 21].map(|seed| random::<3>([2, 3, WIDTH], seed, &Device::flex()));
        let output = recomputed(&part, inputs(), Part::forward);
        assert!(!output.device().is_autodiff());
        assert_eq!(values(output), values(part.forward(inputs())));
    }
}
