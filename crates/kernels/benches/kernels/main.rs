//! Every fused operation, forward and backward, next to its plain twin: `cargo bench --workspace --bench kernels`, a part
//! of a name behind it chooses. Sizes are those of a training step of a small model, with a graph.
//!
//! `item` is a floating point operation where a rate of items is shown, and rates of bytes are of what has to be read and
//! written at least.

mod cases;

use std::fmt;

use burn::tensor::{Device, Tensor};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use fewstep_kernels::{TunedAllocator, inject, with_plain_twins};
use fewstep_testkit::random;

#[global_allocator]
static ALLOCATOR: TunedAllocator = TunedAllocator;

fn main() {
    divan::main();
}

/// An operation with its inputs made.
type Run = Box<dyn Fn() -> Tensor<1>>;

/// What an operation is limited by.
#[derive(Clone, Copy)]
enum Work {
    /// Floating point operations of the forward, and how many times that the backward does.
    Flops(usize, f64),
    /// Bytes of the forward; the backward reads the gradient as well.
    Bytes(usize),
}

/// An operation at one size.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    work: Work,
    make: fn() -> Run,
    /// Takes the plain twin.
    plain: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let twin = if self.plain { ", twin" } else { "" };
        write!(formatter, "{}{twin}", self.name)
    }
}

impl Case {
    fn run<R>(&self, work: impl FnOnce() -> R) -> R {
        if self.plain { with_plain_twins(work) } else { work() }
    }
}

/// Each operation, then its twin.
fn pairs() -> Vec<Case> {
    let both = |case: Case| [case, Case { plain: true, ..case }];
    cases::all().into_iter().flat_map(both).collect()
}

#[divan::bench(args = pairs(), max_time = 1.5)]
fn forward(bencher: Bencher, case: &Case) {
    let operation = (case.make)();
    let run = || case.run(&operation);
    match case.work {
        Work::Flops(flops, _) => bencher.counter(ItemsCount::new(flops)).bench_local(run),
        Work::Bytes(bytes) => bencher.counter(BytesCount::new(bytes)).bench_local(run),
    }
}

#[divan::bench(args = pairs(), max_time = 1.5)]
fn backward(bencher: Bencher, case: &Case) {
    let operation = (case.make)();
    let cotangent = random::<1>(operation().dims(), 3, &Device::flex());
    let record = || case.run(|| inject(operation(), cotangent.clone()));
    let pull_back = |loss: Tensor<1>| loss.backward();
    match case.work {
        Work::Flops(flops, passes) => {
            let counted = bencher.counter(ItemsCount::new((passes * flops as f64) as u64));
            counted.with_inputs(record).bench_local_values(pull_back);
        }
        Work::Bytes(bytes) => {
            bencher.counter(BytesCount::new(3 * bytes / 2)).with_inputs(record).bench_local_values(pull_back);
        }
    }
}
