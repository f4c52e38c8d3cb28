//! The bridge to burn: turns a forward function and its pullback into one node of the autodiff graph, and gives raw
//! `f32` access to flex tensors.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::autodiff::{Autodiff, NodeId};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};
use half::{bf16, f16};

use crate::gradient_sums::{added_to_sum, has_sum};
use crate::twins::takes_plain_twins;

type Differentiable = FloatTensor<Autodiff<Flex>>;

/// Maps the gradient of an operation's output to the gradients of its `N` inputs, `None` where nobody tracks them.
pub(crate) type Pullback<const N: usize> = Box<dyn Fn(Values) -> [Option<Values>; N] + Send + Sync>;

/// Whether an operation on `tensor` is the fused one; if not, the caller takes the plain twin.
pub(crate) fn is_fused<const D: usize>(tensor: &Tensor<D>) -> bool {
    in_host_memory(tensor) && !takes_plain_twins()
}

pub(crate) fn in_host_memory<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.device() == Device::flex()
}

/// A backend's tensor with its place in the graph.
pub(crate) fn graph_tensor<B, const D: usize>(tensor: Tensor<D>) -> FloatTensor<Autodiff<B>>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    tensor.try_into_primitive::<Autodiff<B>>().expect("the caller knows the backend, and that it records")
}

/// A backend's tensor outside of any graph.
pub(crate) fn plain_tensor<B, const D: usize>(tensor: Tensor<D>) -> FloatTensor<B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    tensor.try_into_primitive::<B>().expect("the caller knows the backend, and that it does not record")
}

/// Runs `forward` as one node of the autodiff graph.
///
/// `forward` gets the values of the inputs and which of them are tracked. Its pullback must give a gradient to exactly
/// the tracked inputs, but for those that it adds to a sum itself: burn panics much later about one that got none.
pub(crate) fn operation<const N: usize, const D: usize>(
    inputs: [Input; N],
    forward: impl FnOnce([Values; N], [bool; N]) -> (Values, Pullback<N>),
) -> Tensor<D> {
    let tracked = inputs.each_ref().map(|input| input.tracked);
    if !inputs.iter().any(|input| input.autodiff) {
        return forward(inputs.map(Input::into_values), tracked).0.into_tensor();
    }
    let nodes = inputs.each_ref().map(Input::node);
    let (output, pullback) = forward(inputs.map(Input::into_values), tracked);
    output.into_node(|output| match Fused::<N>.prepare::<NoCheckpointing>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(node) => node.finish(State(Arc::new(pullback)), output),
        OpsKind::UnTracked(node) => node.finish(output),
    })
}

/// One input of an operation. Tensors without autodiff join a graph as constants.
pub(crate) struct Input {
    tensor: Differentiable,
    tracked: bool,
    autodiff: bool,
}

impl Input {
    pub(crate) fn new<const D: usize>(tensor: Tensor<D>) -> Self {
        let tracked = tensor.is_tracked();
        let autodiff = tensor.device().is_autodiff();
        let tensor = if autodiff {
            graph_tensor::<Flex, D>(tensor)
        } else {
            Differentiable::new(plain_tensor::<Flex, D>(tensor))
        };
        Self { tensor, tracked, autodiff }
    }

    /// The tensor, or a stand-in without values.
    pub(crate) fn optional<const D: usize>(tensor: Option<Tensor<D>>) -> Self {
        tensor.map(Self::new).unwrap_or_else(|| Self {
            tensor: Differentiable::new(Values::from_vec(Vec::new(), &[0]).0),
            tracked: false,
            autodiff: false,
        })
    }

    /// Keeps the input's node alive until a node that depends on it is registered.
    pub(crate) fn node(&self) -> NodeGuard {
        self.tensor.node()
    }

    /// The node of an input that has a gradient.
    pub(crate) fn learning_node(&self) -> Option<NodeId> {
        self.tracked.then(|| self.node().id())
    }

    pub(crate) fn into_values(self) -> Values {
        Values::new(self.tensor.into_primitive())
    }
}

/// The values of one tensor in row-major order, shared with burn: cloning copies nothing. They are f32, save for
/// the weights of linear layers (`crate::weight`).
#[derive(Clone)]
pub(crate) struct Values(FlexTensor);

impl Values {
    /// Copies only tensors whose values are not in row-major order.
    pub(crate) fn new(tensor: FlexTensor) -> Self {
        let in_order = tensor.layout().contiguous_offsets().is_some();
        if in_order { Self(tensor) } else { Self(tensor.to_contiguous()) }
    }

    /// The values by their number type.
    pub(crate) fn stored(&self) -> Stored<'_> {
        let expected = "the type was matched, and the order checked when it was made";
        match self.0.dtype() {
            DType::F32 => Stored::F32(self.0.as_slice().expect(expected)),
            DType::BF16 => Stored::Bf16(self.0.as_slice().expect(expected)),
            DType::F16 => Stored::F16(self.0.as_slice().expect(expected)),
            other => panic!("fused operations take floating point tensors, found {other:?}"),
        }
    }

    pub(crate) fn from_vec(values: Vec<f32>, shape: &[usize]) -> Self {
        let shape = Shape::from(shape.to_vec());
        assert_eq!(values.len(), shape.num_elements(), "{} values for shape {shape:?}", values.len());
        Self(FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32))
    }

    /// The values of a tensor without its autodiff history.
    pub(crate) fn detached<const D: usize>(tensor: Tensor<D>) -> Self {
        Input::new(tensor).into_values()
    }

    /// The tensor, for an operation that lies outside of any graph.
    pub(crate) fn into_tensor<const D: usize>(self) -> Tensor<D> {
        Tensor::from_primitive::<Flex>(self.0)
    }

    /// The tensor as the output of a node of the graph.
    pub(crate) fn into_node<const D: usize>(
        self,
        register: impl FnOnce(FlexTensor) -> Differentiable,
    ) -> Tensor<D> {
        Tensor::from_primitive::<Autodiff<Flex>>(register(self.0))
    }

    /// Write access; copies first if somebody else holds these values.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        let (start, end) = self.0.layout().contiguous_offsets().expect("checked when it was made");
        &mut self.0.storage_mut::<f32>()[start..end]
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let values = self.0.as_slice::<f32>();
        values.unwrap_or_else(|| panic!("fused operations take f32 tensors, found {:?}", self.0.dtype()))
    }
}

/// Values of any type that weights are kept in.
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// Lends a tensor's values, in row-major order; only devices other than the CPU, and views, pay for a copy.
pub fn with_values<const D: usize, R>(tensor: Tensor<D>, read: impl FnOnce(&[f32]) -> R) -> R {
    let tensor = tensor.inner();
    if in_host_memory(&tensor) && tensor.dtype() == DType::F32 {
        return read(&Values::detached(tensor));
    }
    read(&tensor.try_into_vec_as::<f32>().expect("a float tensor can be read as f32"))
}

/// A tensor whose values `update` has changed, outside of any graph.
///
/// They are changed in place where they are in host memory and nobody else holds them, and in a copy otherwise.
pub fn updated<const D: usize>(tensor: Tensor<D>, update: impl FnOnce(&mut [f32])) -> Tensor<D> {
    assert!(!tensor.device().is_autodiff(), "values are changed without autodiff history");
    if in_host_memory(&tensor) {
        let mut values = Values::detached(tensor);
        update(values.as_mut_slice());
        return values.into_tensor();
    }
    let (shape, device) = (tensor.dims(), tensor.device());
    let mut values: Vec<f32> = tensor.try_into_vec_as().expect("a float tensor can be read as f32");
    update(&mut values);
    Tensor::from_data(TensorData::new(values, shape), &device)
}

/// A buffer for an operation that writes every element before any is read.
///
/// Zero-filling would be one more pass over memory, as long as a whole element-wise operation takes.
pub(crate) fn unwritten(len: usize) -> Vec<f32> {
    let mut buffer = Vec::with_capacity(len);
    // SAFETY: the capacity is `len`, every bit pattern is a valid `f32`, and each caller overwrites all of it.
    #[allow(clippy::uninit_vec)]
    unsafe {
        buffer.set_len(len);
    }
    buffer
}

#[derive(Debug)]
struct Fused<const N: usize>;

#[derive(Clone)]
struct State<const N: usize>(Arc<Pullback<N>>);

impl<const N: usize> fmt::Debug for State<N> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("fused operation")
    }
}

impl<const N: usize> Backward<Flex, N> for Fused<N> {
    type State = State<N>;

    fn backward(self, operation: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let output_gradient = Values::new(gradients.consume::<Flex>(&operation.node));
        let input_gradients = operation.state.0(output_gradient);
        for (parent, gradient) in operation.parents.into_iter().zip(input_gradients) {
            match (parent, gradient) {
                (Some(parent), Some(gradient)) => {
                    if let Some(gradient) = added_to_sum(parent.id, gradient) {
                        gradients.register::<Flex>(parent.id, gradient.0);
                    }
                }
                (Some(parent), None) => {
                    assert!(has_sum(parent.id), "a fused operation gave no gradient to a tracked input");
                }
                (None, _) => {}
            }
        }
    }
}
