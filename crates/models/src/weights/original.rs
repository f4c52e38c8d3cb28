//! Weights in the layout that a model's authors published, read as if they were in the official one.
//!
//! Tensors have other names there, and some are several of the official ones in one, row after row.

use std::borrow::Cow;

/// The tensors of an original layout whose keys begin so, `*` standing for a number, and what is made of each. What follows
/// in a key stays as it is.
pub(crate) type Rule = (&'static str, Made);

/// What is made of a tensor of an original layout. In the beginnings of official keys `*` stands for the same number, and
/// `^` for the same counted from the other end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Made {
    /// The same tensor.
    Renamed(&'static str),
    /// A matrix, of the weight of a 1×1 convolution.
    Matrix(&'static str),
    /// Several of equal parts of the rows, in an order of their own.
    Rows { parts: usize, of: &'static [(&'static str, &'static [usize])] },
}

/// One tensor of the official layout.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Official {
    pub(crate) key: String,
    pub(crate) shape: Vec<usize>,
    /// Its rows in the original tensor, in equal parts: how many parts that has, and which they are. `None` for all.
    pub(crate) rows: Option<(usize, &'static [usize])>,
}

/// The official tensors of an original one; none where no rule is about it, or its rows are not so many equal parts.
///
/// `numbers` are those that stand in the keys of the same rule, see [`Numbers`].
pub(crate) fn official(
    rules: &'static [Rule],
    numbers: &Numbers,
    key: &str,
    shape: &[usize],
) -> Vec<Official> {
    let Some((rule, found)) = rule_of(rules, key) else { return Vec::new() };
    let name = |start: &str| format!("{}{}", written(start, &found.numbers, numbers.last(rule)), found.rest);
    let whole = |start: &str, shape: Vec<usize>| vec![Official { key: name(start), shape, rows: None }];
    match rules[rule].1 {
        Made::Renamed(start) => whole(start, shape.to_vec()),
        Made::Matrix(start) => {
            let sides = shape.iter().rposition(|side| *side != 1).map_or(0, |last| last + 1);
            whole(start, shape[..sides.max(2).min(shape.len())].to_vec())
        }
        Made::Rows { parts, of } => match shape {
            [rows, rest @ ..] if rows % parts == 0 => of
                .iter()
                .map(|(start, chosen)| {
                    let shape = [&[rows / parts * chosen.len()], rest].concat();
                    Official { key: name(start), shape, rows: Some((parts, chosen)) }
                })
                .collect(),
            _ => Vec::new(),
        },
    }
}

/// The highest number that any key has where each rule has its first.
pub(crate) struct Numbers(Vec<usize>);

impl Numbers {
    /// Of the keys of a file.
    pub(crate) fn of<'a>(rules: &'static [Rule], keys: impl Iterator<Item = &'a str> + Clone) -> Self {
        let last = |(start, _): &Rule| {
            let (before, _) = start.split_once('*')?;
            let number = |key: &str| key.strip_prefix(before)?.split('.').next()?.parse::<usize>().ok();
            keys.clone().filter_map(number).max()
        };
        Self(rules.iter().map(|rule| last(rule).unwrap_or(0)).collect())
    }

    fn last(&self, rule: usize) -> usize {
        self.0[rule]
    }
}

/// What a rule finds in a key.
struct Found<'a> {
    numbers: Vec<usize>,
    /// What follows, with its dot.
    rest: &'a str,
}

/// The first rule that fits, by its place.
fn rule_of<'a>(rules: &'static [Rule], key: &'a str) -> Option<(usize, Found<'a>)> {
    rules.iter().enumerate().find_map(|(at, (start, _))| Some((at, found(start, key)?)))
}

fn found<'a>(start: &str, key: &'a str) -> Option<Found<'a>> {
    let (mut numbers, mut rest) = (Vec::new(), key);
    for (at, expected) in start.split('.').enumerate() {
        if at > 0 {
            rest = rest.strip_prefix('.')?;
        }
        let end = rest.find('.').unwrap_or(rest.len());
        let (segment, after) = rest.split_at(end);
        match expected {
            "*" => numbers.push(segment.parse().ok()?),
            _ if segment == expected => {}
            _ => return None,
        }
        rest = after;
    }
    Some(Found { numbers, rest })
}

/// The beginning of an official key with its numbers.
fn written(start: &str, numbers: &[usize], last: usize) -> String {
    let mut numbers = numbers.iter();
    let mut next = || numbers.next().expect("as many numbers as in the rule");
    let segments = start.split('.').map(|segment| match segment {
        "*" => Cow::Owned(next().to_string()),
        "^" => Cow::Owned((last - next()).to_string()),
        plain => Cow::Borrowed(plain),
    });
    segments.collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &[Rule] = &[
        ("up.*.block.*.skip", Made::Renamed("ups.^.resnets.*.conv_shortcut")),
        ("up.*.block.*", Made::Renamed("ups.^.resnets.*")),
        ("mid.q", Made::Matrix("mid.to_q")),
        ("block.*.qkv", Made::Rows { parts: 3, of: &[("blocks.*.q", &[0]), ("blocks.*.kv", &[2, 1])] }),
    ];

    fn made(key: &str, shape: &[usize]) -> Vec<Official> {
        let numbers =
            Numbers::of(RULES, ["up.0.block.4.norm", "up.3.block.0.norm", "block.7.qkv"].into_iter());
        official(RULES, &numbers, key, shape)
    }

    fn renamed(key: &str, shape: &[usize]) -> Vec<Official> {
        vec![Official { key: key.into(), shape: shape.to_vec(), rows: None }]
    }

    #[test]
    fn the_first_rule_counts_and_numbers_are_carried_over() {
        assert_eq!(made("up.1.block.4.norm.weight", &[8]), renamed("ups.2.resnets.4.norm.weight", &[8]));
        // No other key of that rule has a number as high as those of the rule after it.
        assert_eq!(made("up.1.block.0.skip.bias", &[8]), renamed("ups.2.resnets.0.conv_shortcut.bias", &[8]));
        assert_eq!(made("up.x.block.0.skip.bias", &[8]), []);
        assert_eq!(made("up.1.blocks.0.norm", &[8]), []);
    }

    #[test]
    fn a_convolution_of_one_pixel_is_a_matrix() {
        assert_eq!(made("mid.q.weight", &[8, 4, 1, 1]), renamed("mid.to_q.weight", &[8, 4]));
        assert_eq!(made("mid.q.weight", &[8, 1, 1, 1]), renamed("mid.to_q.weight", &[8, 1]));
        assert_eq!(made("mid.q.bias", &[8]), renamed("mid.to_q.bias", &[8]));
    }

    #[test]
    fn rows_are_cut_in_equal_parts() {
        let part = |key: &str, shape: &[usize], rows: &'static [usize]| Official {
            key: key.into(),
            shape: shape.to_vec(),
            rows: Some((3, rows)),
        };
        let parts = [part("blocks.5.q.weight", &[4, 6], &[0]), part("blocks.5.kv.weight", &[8, 6], &[2, 1])];
        assert_eq!(made("block.5.qkv.weight", &[12, 6]), parts);
        assert_eq!(made("block.5.qkv.weight", &[13, 6]), []);
    }
}
