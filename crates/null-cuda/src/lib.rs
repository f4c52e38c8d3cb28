//! A CUDA driver that computes nothing, for machines without a GPU.
//!
//! Put into a folder as `libcuda.so`, and that folder first into `LD_LIBRARY_PATH`, it lets a program built with the
//! feature `cuda` run: the program makes its kernels, NVRTC compiles each of them, memory is taken from a card that is
//! only counted, and every launch is believed. What is read back is zero. So it shows that all kernels compile, what a
//! run holds on the card, how often it launches and waits, and what is said of a card that is missing, old or small;
//! no number that a model computes, and no time.
//!
//! The card is an H200, save for what the environment says otherwise:
//! - `NULL_CUDA_DEVICES`: how many there are; 1
//! - `NULL_CUDA_DRIVER`: the version of CUDA that the driver supports, as `13000` for 13.0
//! - `NULL_CUDA_MEMORY`: bytes of memory
//! - `NULL_CUDA_CAPABILITY`: the compute capability, as `90` for 9.0
//! - `NULL_CUDA_REPORT`: a file that gets what was counted, as JSON, when the process ends

mod account;
mod driver;
