//! Gradient checkpointing (arXiv 1604.06174): a part of a network as one node of the autodiff graph that keeps nothing
//! but its inputs and runs again when its gradient is asked for.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::autodiff::{Autodiff, NodeId};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, DispatchKindConversion, DispatchTensor, Flex};
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use crate::extension::in_host_memory;
use crate::inject;
use crate::twins::takes_plain_twins;

/// `forward(module, inputs)`, whose inside is computed once more in the backward pass instead of being kept.
///
/// Values and gradients are those of calling `forward`, the gradients of the module's parameters included. What else
/// `forward` holds must not learn.
///
/// # Shapes
/// Any of three axes.
pub fn recomputed<M, F, const N: usize>(module: &M, inputs: [Tensor<3>; N], forward: F) -> Tensor<3>
where
    M: Module + 'static,
    F: Fn(&M, [Tensor<3>; N]) -> Tensor<3> + Send + Sync + 'static,
{
    if !inputs[0].device().is_autodiff() || takes_plain_twins() {
        return forward(module, inputs);
    }
    if in_host_memory(&inputs[0]) {
        return on::<Flex, _, _, N>(module, inputs, forward);
    }
    #[cfg(feature = "cube")]
    return on::<burn::backend::Cube, _, _, N>(module, inputs, forward);
    #[cfg(not(feature = "cube"))]
    forward(module, inputs)
}

/// The same on the autodiff side of a backend.
fn on<B, M, F, const N: usize>(module: &M, mut inputs: [Tensor<3>; N], forward: F) -> Tensor<3>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
    M: Module + 'static,
    F: Fn(&M, [Tensor<3>; N]) -> Tensor<3> + Send + Sync + 'static,
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
    let output = forward(&module, inputs.clone().map(Tensor::inner));
    let nodes = inputs.each_ref().map(|input| graph_tensor::<B, 3>(input.clone()).node());
    let state = State { module, inputs: inputs.map(Tensor::inner), parameters, forward: Arc::new(forward) };
    let node = Recomputed::<M, F>(PhantomData);
    match node.prepare::<NoCheckpointing>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(node) => {
            Tensor::from_primitive::<Autodiff<B>>(node.finish(state, plain_tensor::<B, 3>(output)))
        }
        OpsKind::UnTracked(_) => unreachable!("an input is tracked"),
    }
}

/// The backend's tensor with its place in the graph.
fn graph_tensor<B, const D: usize>(tensor: Tensor<D>) -> FloatTensor<Autodiff<B>>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    tensor.try_into_primitive::<Autodiff<B>>().expect("the caller knows the backend, and that it records")
}

/// The backend's tensor of one without a graph.
fn plain_tensor<B, const D: usize>(tensor: Tensor<D>) -> FloatTensor<B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    tensor.try_into_primitive::<B>().expect("the caller knows the backend, and that it does not record")
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
struct Recomputed<M, F>(PhantomData<fn(M, F)>);

impl<M, F> fmt::Debug for Recomputed<M, F> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("recomputed part")
    }
}

struct State<B, M, F, const N: usize> {
    /// On the plain side, as the inputs.
    module: M,
    inputs: [Tensor<3>; N],
    parameters: Learning<B>,
    forward: Arc<F>,
}

impl<B, M: Clone, F, const N: usize> Clone for State<B, M, F, N> {
    fn clone(&self) -> Self {
        let Self { module, inputs, parameters, forward } = self;
        Self {
            module: module.clone(),
            inputs: inputs.clone(),
            parameters: parameters.clone(),
            forward: forward.clone(),
        }
    }
}

impl<B, M, F, const N: usize> fmt::Debug for State<B, M, F, N> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("inputs of a recomputed part")
    }
}

impl<B, M, F, const N: usize> Backward<B, N> for Recomputed<M, F>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
    M: Module + 'static,
    F: Fn(&M, [Tensor<3>; N]) -> Tensor<3> + Send + Sync + 'static,
{
    type State = State<B, M, F, N>;

    /// The graph in here has leaves of its own and shares no node with the one outside, whose lock is held meanwhile.
    fn backward(self, operation: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let cotangent = Tensor::from_primitive::<B>(gradients.consume::<B>(&operation.node));
        let State { module, inputs, parameters, forward } = operation.state;
        let module = module.train();
        let mut parents = operation.parents.iter();
        let inputs = inputs.map(|input| {
            let input = input.autodiff();
            let tracked = parents.next().is_some_and(Option::is_some);
            if tracked { input.require_grad() } else { input }
        });
        let mut inner = inject(forward(&module, inputs.clone()), cotangent).backward();
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
        if let Some(gradient) = parameter.val().grad_remove(&mut self.inner) {
            self.gradients.register::<B>(*node, plain_tensor::<B, D>(gradient));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gelu, Projection, gelu, linear};
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, random, values};

    const WIDTH: usize = 6;

    /// gelu(x up) down + y, and a parameter that nothing reads.
    #[derive(Module, Debug)]
    struct Part {
        up: Param<Tensor<2>>,
        down: Param<Tensor<2>>,
        unread: Param<Tensor<2>>,
    }

    impl Part {
        fn new(seed: u64) -> Self {
            let weight = |seed| Param::from_tensor(random([WIDTH, WIDTH], seed, &Device::flex()));
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

    /// The output of one part after the other, both used twice, and all gradients.
    fn run(call: Call, tracked: Tracked) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
        let mut first = Part::new(1);
        first.up = first.up.set_require_grad(tracked.up);
        first.down = first.down.set_require_grad(tracked.down);
        let parts = [first.train(), Part::new(5).set_require_grad(false).train()];
        let input = |seed, tracked| {
            let input = random::<3>([2, 3, WIDTH], seed, &Device::flex()).autodiff();
            if tracked { input.require_grad() } else { input }
        };
        let (x, y) = (input(20, tracked.x), input(21, tracked.y));
        let mut hidden = x.clone();
        for part in parts.iter().chain(&parts) {
            hidden = call(part, [hidden, y.clone()]);
        }
        let cotangent = random([2, 3, WIDTH], 22, &Device::flex());
        let gradients = inject(hidden.clone(), cotangent).backward();
        let weights = parts.iter().flat_map(|part| [&part.up, &part.down, &part.unread]);
        let weights = weights.map(|weight| weight.val().grad(&gradients).map(values));
        let inputs = [(x, tracked.x), (y, tracked.y)];
        let inputs = inputs.map(|(x, tracked)| tracked.then(|| values(x.grad(&gradients).unwrap())));
        (values(hidden), weights.chain(inputs).collect())
    }

    #[test]
    fn a_recomputed_part_equals_one_that_is_kept_whatever_has_a_gradient() {
        for bits in 1..16 {
            let bit = |index: usize| bits >> index & 1 == 1;
            let tracked = Tracked { up: bit(0), down: bit(1), x: bit(2), y: bit(3) };
            let ((output, gradients), (kept, expected)) = (run(RECOMPUTED, tracked), run(KEPT, tracked));
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
    fn nothing_is_recorded_without_a_graph() {
        let part = Part::new(1);
        let inputs = || [20, 21].map(|seed| random::<3>([2, 3, WIDTH], seed, &Device::flex()));
        let output = recomputed(&part, inputs(), Part::forward);
        assert!(!output.device().is_autodiff());
        assert_eq!(values(output), values(part.forward(inputs())));
    }
}
