//! The adjoint's promise: peak memory does not grow with the number of steps, while the plain tape's does.
//!
//! Alone in its test binary, because it counts what the whole process allocates.

use burn::tensor::{Device, Tensor, activation::tanh};
use fewstep_flow::{SigmaGrid, Solver, adjoint, sample};
use fewstep_testkit::random;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const BATCH: usize = 64;
const WIDTH: usize = 64;
/// Wide enough that one step's graph (two activations of 8 MiB) outweighs everything else in the process.
const HIDDEN: usize = 32 * 1024;

/// A two-layer network whose activations are large and whose state is small.
struct Net {
    up: Tensor<2>,
    down: Tensor<2>,
}

impl Net {
    fn velocity(&self, state: Tensor<2>) -> Tensor<2> {
        tanh(state.matmul(self.up.clone())).matmul(self.down.clone())
    }
}

fn by_adjoint(plain: &Net, tracked: &Net, noise: Tensor<2>, steps: usize) {
    let grid = SigmaGrid::uniform(steps).expect("at least one step");
    let states = adjoint::rollout(&grid, noise, |state, _| plain.velocity(state));
    let loss_gradient = states[steps].clone();
    adjoint::backward(&grid, &states, loss_gradient, |_, state, _, cotangent| {
        adjoint::Recorded::new(state, |state| tracked.velocity(state)).pull_back(cotangent).input_gradient
    });
}

fn by_tape(tracked: &Net, noise: Tensor<2>, steps: usize) {
    let grid = SigmaGrid::uniform(steps).expect("at least one step");
    sample(Solver::Euler, &grid, noise.autodiff(), |state, _| tracked.velocity(state))
        .square()
        .sum()
        .backward();
}

/// The most megabytes that were allocated at once during some work.
fn peak_mb(work: impl FnOnce()) -> f32 {
    MEMORY.reset_peak_usage();
    work();
    MEMORY.peak_usage_as_mb()
}

#[test]
fn adjoint_memory_does_not_grow_with_the_steps() {
    let device = Device::flex();
    let up = random([WIDTH, HIDDEN], 1, &device) * 0.1;
    let down = random([HIDDEN, WIDTH], 2, &device) * 0.005;
    let track = |weight: &Tensor<2>| weight.clone().autodiff().require_grad();
    let tracked = Net { up: track(&up), down: track(&down) };
    let plain = Net { up, down };
    let noise = random([BATCH, WIDTH], 3, &device);

    by_adjoint(&plain, &tracked, noise.clone(), 2); // what a thread allocates once and keeps
    let two_steps = peak_mb(|| by_adjoint(&plain, &tracked, noise.clone(), 2));
    let eight_steps = peak_mb(|| by_adjoint(&plain, &tracked, noise.clone(), 8));
    let tape = peak_mb(|| by_tape(&tracked, noise, 8));
    assert!(eight_steps < 1.05 * two_steps, "{two_steps} MB at 2 steps, {eight_steps} MB at 8");
    // The check above means nothing unless the graph is what fills the memory: the tape must stand out.
    assert!(tape > 1.3 * eight_steps, "{eight_steps} MB by adjoint, {tape} MB by tape");
}
