//! Builds what the repository ships of emoji: the pictures with their captions, a tokenizer for the captions, and the
//! model that the teacher's training starts from.

mod captions;
mod contact_sheet;
mod iconify;
mod pictures;
mod start;
mod tokenizer;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use fewstep_data::emoji::{EmojiSet, Language};
use fewstep_kernels::TunedAllocator;

#[global_allocator]
static ALLOCATOR: TunedAllocator = TunedAllocator;

/// Builds assets/emoji and the teacher's tokenizer from upstream emoji packages.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Join the upstream pictures with their labels and write the data set.
    Pictures {
        /// Folder with the four upstream files; assets/emoji/README.md lists them.
        #[arg(long)]
        source: PathBuf,
        /// Folder to write concepts.jsonl and a zip of pictures per style to.
        #[arg(long, default_value = "assets/emoji")]
        output: PathBuf,
    },
    /// Train the byte-level BPE tokenizer on all captions of a built data set.
    Tokenizer {
        /// Folder of the data set.
        #[arg(long, default_value = "assets/emoji")]
        emoji: PathBuf,
        /// Folder to write the tokenizer files to.
        #[arg(long, default_value = "assets/teacher/tokenizer")]
        output: PathBuf,
        /// Number of tokens, special ones not counted.
        #[arg(long, default_value_t = 3000)]
        vocabulary: usize,
    },
    /// Write the model that the teacher's training starts from: a random transformer, and a text encoder that has
    /// learned what the captions look like.
    Start {
        /// Model folder with the configs and the tokenizer.
        #[arg(long, default_value = "assets/teacher")]
        model: PathBuf,
        /// Folder that `data-set` wrote.
        #[arg(long)]
        data_set: PathBuf,
        /// Model folder to write.
        #[arg(long)]
        output: PathBuf,
        /// Optimiser steps of the text encoder.
        #[arg(long, default_value_t = 4000)]
        steps: u64,
    },
    /// Draw some concepts of a built data set in all styles, to look at.
    ContactSheet {
        /// Folder of the data set.
        #[arg(long, default_value = "assets/emoji")]
        emoji: PathBuf,
        /// The png file to write.
        #[arg(long)]
        output: PathBuf,
        /// Number of concepts, spread evenly over the set.
        #[arg(long, default_value_t = 96)]
        concepts: usize,
    },
    /// Write the set as an ordinary data set: pictures, metadata.csv, and held_out.csv for evaluation.
    DataSet {
        /// Folder of the data set.
        #[arg(long, default_value = "assets/emoji")]
        emoji: PathBuf,
        /// The folder to write; it must not hold anything yet.
        #[arg(long)]
        output: PathBuf,
        /// Only concepts of these groups, separated by commas [default: all].
        #[arg(long, value_delimiter = ',')]
        groups: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Pictures { source, output } => pictures::build(&source, &output),
        Command::Tokenizer { emoji, output, vocabulary } => tokenizer::build(&emoji, &output, vocabulary),
        Command::Start { model, data_set, output, steps } => {
            start::build(&start::Folders { model, data_set, output }, steps)
        }
        Command::ContactSheet { emoji, output, concepts } => contact_sheet::draw(&emoji, &output, concepts),
        Command::DataSet { emoji, output, groups } => {
            let languages = [Language::English, Language::Chinese];
            let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
            Ok(EmojiSet::open(&emoji)?.write_training_folder(&output, &languages, &groups)?)
        }
    }
}
