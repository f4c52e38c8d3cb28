//! What an optimiser remembers of one parameter, and its form in a checkpoint: tensors called `parameter.part`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use fewstep_kernels::{Moments, Moments8bit, Quantized};
use fewstep_models::Numbers;

use super::adafactor::MeanSquares;
use super::prodigy::Travelled;

/// One parameter's state, by optimiser.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    /// AdamW's, and that of the parameters which other optimisers leave to it.
    Moments(Moments),
    Moments8bit(Moments8bit),
    MeanSquares(MeanSquares),
    Travelled(Travelled),
    Momentum(Vec<f32>),
}

/// The state of a whole optimiser as it is saved.
pub(crate) type SavedState<'a> = BTreeMap<String, Numbers<'a>>;

const FIRST: &str = "first";
const SECOND: &str = "second";
const FIRST_SCALES: &str = "first_scales";
const SECOND_SCALES: &str = "second_scales";
const ROWS: &str = "rows";
const COLUMNS: &str = "columns";
const SQUARES: &str = "squares";
const SUM: &str = "sum";
const START: &str = "start";
const MOMENTUM: &str = "momentum";

impl Memory {
    /// Prodigy's, of a parameter that starts here.
    pub(crate) fn travelled(start: &[f32]) -> Self {
        Self::Travelled(Travelled::from(start))
    }

    /// Prodigy's.
    ///
    /// # Panics
    /// If it is another optimiser's, which is ruled out when a state is restored.
    pub(crate) fn as_travelled(&mut self) -> &mut Travelled {
        match self {
            Self::Travelled(travelled) => travelled,
            other => panic!("expected Prodigy's state, found {other:?}"),
        }
    }

    /// Whether it could be the other's later state: of the same optimiser, for a parameter of the same shape.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let sizes = |memory: &Self| {
            memory.parts().iter().map(|(part, numbers)| (*part, numbers.size_bytes())).collect::<Vec<_>>()
        };
        sizes(self) == sizes(other)
    }

    /// Its tensors by the name of the part.
    fn parts<'a>(&'a self) -> Vec<(&'static str, Numbers<'a>)> {
        let floats = |values: &'a [f32]| Numbers::F32(Cow::Borrowed(values));
        let codes = |codes: &'a [u8]| Numbers::U8(Cow::Borrowed(codes));
        match self {
            Self::Moments(moments) => {
                let [first, second] = moments.read().map(Numbers::F32);
                vec![(FIRST, first), (SECOND, second)]
            }
            Self::Moments8bit(Moments8bit { first, second }) => vec![
                (FIRST, codes(&first.codes)),
                (FIRST_SCALES, floats(&first.scales)),
                (SECOND, codes(&second.codes)),
                (SECOND_SCALES, floats(&second.scales)),
            ],
            Self::MeanSquares(MeanSquares::Factored { rows, columns }) => {
                vec![(ROWS, floats(rows)), (COLUMNS, floats(columns))]
            }
            Self::MeanSquares(MeanSquares::Whole(squares)) => vec![(SQUARES, floats(squares))],
            Self::Travelled(Travelled { moments, sum, start }) => {
                let [first, second] = moments.read().map(Numbers::F32);
                vec![(FIRST, first), (SECOND, second), (SUM, floats(sum)), (START, floats(start))]
            }
            Self::Momentum(momentum) => vec![(MOMENTUM, floats(momentum))],
        }
    }

    /// The memory these parts make up; `None` where they are of none.
    fn from_parts(mut parts: SavedState<'_>) -> Option<Self> {
        let names: Vec<String> = parts.keys().cloned().collect();
        let mut f32s = |part: &str| match parts.remove(part)? {
            Numbers::F32(values) => Some(values.into_owned()),
            _ => None,
        };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match names.as_slice() {
            [FIRST, SECOND] => Some(Self::Moments(Moments::Host([f32s(FIRST)?, f32s(SECOND)?]))),
            [FIRST, FIRST_SCALES, SECOND, SECOND_SCALES] => {
                let scales = [f32s(FIRST_SCALES)?, f32s(SECOND_SCALES)?];
                let mut codes = |part: &str| match parts.remove(part)? {
                    Numbers::U8(codes) => Some(codes.into_owned()),
                    _ => None,
                };
                let codes = [codes(FIRST)?, codes(SECOND)?];
                let mut pairs =
                    codes.into_iter().zip(scales).map(|(codes, scales)| Quantized { codes, scales });
                Some(Self::Moments8bit(Moments8bit { first: pairs.next()?, second: pairs.next()? }))
            }
            [COLUMNS, ROWS] => {
                Some(Self::MeanSquares(MeanSquares::Factored { rows: f32s(ROWS)?, columns: f32s(COLUMNS)? }))
            }
            [SQUARES] => Some(Self::MeanSquares(MeanSquares::Whole(f32s(SQUARES)?))),
            [FIRST, SECOND, START, SUM] => Some(Self::Travelled(Travelled {
                moments: Moments::Host([f32s(FIRST)?, f32s(SECOND)?]),
                sum: f32s(SUM)?,
                start: f32s(START)?,
            })),
            [MOMENTUM] => Some(Self::Momentum(f32s(MOMENTUM)?)),
            _ => None,
        }
    }
}

/// The memories of all parameters as they are saved.
pub(crate) fn save(memories: &BTreeMap<String, Memory>) -> SavedState<'_> {
    let mut saved = SavedState::new();
    for (name, memory) in memories {
        let parts = memory.parts().into_iter();
        saved.extend(parts.map(|(part, numbers)| (format!("{name}.{part}"), numbers)));
    }
    saved
}

/// The memories by parameter, from their saved tensors.
///
/// # Errors
/// The parameter whose tensors are of no optimiser.
pub(crate) fn restore(saved: SavedState<'_>) -> Result<BTreeMap<String, Memory>, String> {
    let mut grouped: BTreeMap<String, SavedState<'_>> = BTreeMap::new();
    for (key, numbers) in saved {
        let (name, part) = key.rsplit_once('.').unwrap_or((&key, ""));
        grouped.entry(name.to_owned()).or_default().insert(part.to_owned(), numbers);
    }
    let whole = |(name, parts): (String, _)| match Memory::from_parts(parts) {
        Some(memory) => Ok((name, memory)),
        None => Err(name),
    };
    grouped.into_iter().map(whole).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Tensor};

    #[test]
    fn every_memory_comes_back_from_its_saved_form() {
        let moments = || Moments::Host([vec![1.0, 2.0], vec![3.0, 4.0]]);
        let on_device = [1.0, 3.0].map(|number| Tensor::from_floats([number, 2.0], &Device::flex()));
        let quantized = |code| Quantized { codes: vec![code, 7], scales: vec![0.5] };
        let memories = BTreeMap::from([
            ("a.bias".to_owned(), Memory::Moments(Moments::Device(on_device.into()))),
            ("a.weight".to_owned(), Memory::Moments(moments())),
            (
                "b.weight".to_owned(),
                Memory::Moments8bit(Moments8bit { first: quantized(1), second: quantized(2) }),
            ),
            (
                "c.weight".to_owned(),
                Memory::MeanSquares(MeanSquares::Factored { rows: vec![1.0], columns: vec![2.0, 3.0] }),
            ),
            ("c.bias".to_owned(), Memory::MeanSquares(MeanSquares::Whole(vec![5.0, 6.0]))),
            (
                "d.weight".to_owned(),
                Memory::Travelled(Travelled {
                    moments: moments(),
                    sum: vec![5.0, 6.0],
                    start: vec![7.0, 8.0],
                }),
            ),
            ("e.weight".to_owned(), Memory::Momentum(vec![9.0, 1.0])),
        ]);
        let saved = save(&memories);
        let restored = restore(saved.clone()).expect("all are those of an optimiser");
        assert_eq!(save(&restored), saved);
        assert_eq!(saved["a.bias.second"], Numbers::F32(vec![3.0, 2.0].into()));
    }

    #[test]
    fn a_memory_is_like_that_of_the_same_optimiser_and_shape() {
        let zeros = |len| Memory::Moments8bit(Moments8bit::zeros(len));
        assert!(zeros(300).is_like(&zeros(300)));
        assert!(!zeros(300).is_like(&zeros(299)));
        assert!(!Memory::Momentum(vec![0.0; 300]).is_like(&Memory::Moments(Moments::zeros(300))));
    }

    #[test]
    fn parts_of_no_optimiser_name_their_parameter() {
        let saved = SavedState::from([("a.weight.first".to_owned(), Numbers::F32(vec![1.0].into()))]);
        assert_eq!(restore(saved).unwrap_err(), "a.weight");
        let codes = |part: &str| (format!("a.weight.{part}"), Numbers::U8(vec![1].into()));
        assert!(restore(SavedState::from([codes("first"), codes("second")])).is_err());
    }
}
