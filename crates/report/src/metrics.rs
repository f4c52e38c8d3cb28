//! The numbers of an evaluation: paired error to the teacher, distance between sets of pictures, prompt retrieval.
//!
//! Sums are in f64; nothing here knows which network the features came from.

use fewstep_data::image::Picture;
use rayon::prelude::*;

use crate::Features;
use crate::product::times_transposed;

/// Share of queries whose own reference is the nearest, or among the five nearest, in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retrieval {
    /// Its own reference is the nearest.
    pub top1: f64,
    /// Its own reference is among the five nearest.
    pub top5: f64,
}

/// Mean squared difference over all elements.
///
/// # Panics
/// When the lengths differ.
pub fn latent_mse(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "elements to compare");
    let squares = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    squares.sum::<f64>() / a.len() as f64
}

/// Peak signal-to-noise ratio in dB at peak 255: the mean over pairs of pictures of each pair's own ratio.
///
/// Equal pictures have an infinite ratio, which would drown the others. Such a pair counts as if a single byte differed
/// by one, the nearest that unequal pictures can be (89.0 dB at 64 × 64 px). `None` without pictures.
///
/// # Panics
/// When two partners differ in size.
pub fn psnr_db(pictures: &[Picture], references: &[Picture]) -> Option<f64> {
    assert_eq!(pictures.len(), references.len(), "pictures to compare");
    let ratios = pictures.iter().zip(references).map(|(picture, reference)| {
        let size = |p: &Picture| (p.width, p.height, p.rgb.len());
        assert_eq!(size(picture), size(reference), "width, height and bytes of two pictures to compare");
        pair_psnr_db(&picture.rgb, &reference.rgb)
    });
    (!pictures.is_empty()).then(|| ratios.sum::<f64>() / pictures.len() as f64)
}

fn pair_psnr_db(a: &[u8], b: &[u8]) -> f64 {
    let squares: u64 = a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
    let mse = squares.max(1) as f64 / a.len() as f64;
    10.0 * (255.0 * 255.0 / mse).log10()
}

/// Kernel Inception Distance (arXiv 1801.01401): the unbiased estimate of the squared maximum mean discrepancy between
/// two sets of features under the kernel (x·y/width + 1)³.
///
/// Zero on average when both sets come from one distribution, and then negative as often as positive. `None` when a
/// set has fewer than two pictures.
///
/// # Panics
/// When the sets' features differ in width.
pub fn kid(a: &Features, b: &Features) -> Option<f64> {
    assert_eq!(a.width(), b.width(), "widths of the features to compare");
    let (m, n) = (a.count() as f64, b.count() as f64);
    let within =
        |x: &Features, count: f64| kernel_sum(x, x, |row, column| row != column) / (count * (count - 1.0));
    (m > 1.0 && n > 1.0).then(|| within(a, m) + within(b, n) - 2.0 * kernel_sum(a, b, |_, _| true) / (m * n))
}

/// The kernel summed over the pairs (row of `a`, row of `b`) that are `counted`.
fn kernel_sum(a: &Features, b: &Features, counted: impl Fn(usize, usize) -> bool + Sync) -> f64 {
    let products = products(a, b);
    let kernel = |product: f32| (f64::from(product) / a.width() as f64 + 1.0).powi(3);
    let sums: Vec<f64> = products
        .par_chunks_exact(b.count())
        .enumerate()
        .map(|(row, products)| {
            let counted = products.iter().enumerate().filter(|(column, _)| counted(row, *column));
            counted.map(|(_, product)| kernel(*product)).sum()
        })
        .collect();
    sums.iter().sum()
}

/// Prompt retrieval: how often a picture's nearest reference, by cosine similarity, is the one of its own prompt.
///
/// `references` holds one picture per prompt (the teacher's or the real one), `truth` for each query the index of its
/// reference. References that are equally near share the places they occupy, so that a set of equal pictures scores
/// chance and not luck. A picture that serves two prompts should be one reference, named twice in `truth`. `None`
/// without queries.
///
/// # Panics
/// When widths differ or `truth` does not name a reference for each query.
pub fn retrieval(queries: &Features, references: &Features, truth: &[usize]) -> Option<Retrieval> {
    assert_eq!(queries.width(), references.width(), "widths of the features to compare");
    assert_eq!(queries.count(), truth.len(), "queries and their references");
    let similarities = products(&unit_rows(queries), &unit_rows(references));
    let share = |places: usize| {
        let rows = similarities.chunks_exact(references.count()).zip(truth);
        rows.map(|(row, truth)| chance_within(places, row, *truth)).sum::<f64>() / truth.len() as f64
    };
    (!truth.is_empty()).then(|| Retrieval { top1: share(1), top5: share(5) })
}

/// The chance that `truth` is among the first `places` of a row sorted by similarity, ties in random order.
fn chance_within(places: usize, similarities: &[f32], truth: usize) -> f64 {
    let own = similarities[truth];
    let nearer = similarities.iter().filter(|other| **other > own).count();
    let tied = similarities.iter().filter(|other| **other == own).count();
    // A feature that is no number ties with nothing, not even with itself: it is found nowhere.
    let free = places.saturating_sub(nearer) as f64;
    if tied == 0 { 0.0 } else { (free / tied as f64).min(1.0) }
}

/// Rows scaled to length one; a row of zeros stays as it is.
fn unit_rows(features: &Features) -> Features {
    let mut values = features.values().to_vec();
    for row in values.chunks_exact_mut(features.width()) {
        let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 1.0 };
        row.iter_mut().for_each(|value| *value = (f64::from(*value) * scale) as f32);
    }
    Features::new(values, features.width())
}

/// Dot products of every row of `a` with every row of `b`, row-major.
fn products(a: &Features, b: &Features) -> Vec<f32> {
    /// Rows per task: enough for a fast product, few enough to keep all threads busy.
    const ROWS: usize = 32;
    let mut out = vec![0.0; a.count() * b.count()];
    let rows = a.values().par_chunks(ROWS * a.width());
    rows.zip(out.par_chunks_mut((ROWS * b.count()).max(1)))
        .for_each(|(rows, out)| times_transposed(rows, b.values(), a.width(), out));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(levels: &[u8]) -> Picture {
        Picture { width: levels.len() / 3, height: 1, rgb: levels.to_vec() }
    }

    #[test]
    fn latent_mse_is_the_mean_of_squares() {
        assert_eq!(latent_mse(&[1.0, -2.0, 0.5], &[0.0, 1.0, 0.5]), 10.0 / 3.0);
    }

    #[test]
    fn psnr_is_averaged_over_pictures_not_over_pixels() {
        // Squared errors of 100 and of 1 everywhere: 28.1308 and 48.1308 dB.
        let pictures = [grey(&[10, 20, 30]), grey(&[7, 7, 7])];
        let references = [grey(&[20, 10, 40]), grey(&[8, 6, 8])];
        let psnr = psnr_db(&pictures, &references).unwrap();
        assert!((psnr - 38.130_803_608_679_1).abs() < 1e-9, "{psnr}");
    }

    #[test]
    fn equal_pictures_have_the_finite_psnr_of_one_byte_off_by_one() {
        let equal = psnr_db(&[grey(&[1, 2, 3])], &[grey(&[1, 2, 3])]).unwrap();
        let nearly = psnr_db(&[grey(&[1, 2, 3])], &[grey(&[1, 2, 4])]).unwrap();
        assert_eq!(equal, nearly);
        assert!((equal - 10.0 * (3.0 * 65_025.0_f64).log10()).abs() < 1e-9, "{equal}");
        assert_eq!(psnr_db(&[], &[]), None);
    }

    #[test]
    fn kid_equals_the_hand_computed_sum() {
        let a = Features::new(vec![1., 1., 2., 0.], 2);
        let b = Features::new(vec![0., 2., -2., 0., 1., -1.], 2);
        // Kernels (x.y/2 + 1)^3. Within a: x.y = 2 gives 8. Within b: 0, -2, -2 give 1, 0, 0, so 1/3 on average.
        // Across: 2, -2, 0 and 0, -4, 2 give 8, 0, 1, 1, -1, 8, so 17/6 on average.
        let expected = 8.0 + 1.0 / 3.0 - 2.0 * 17.0 / 6.0;
        assert!((kid(&a, &b).unwrap() - expected).abs() < 1e-12);
        assert_eq!(kid(&a, &b.select(&[0])), None);
    }

    #[test]
    fn kid_of_two_halves_of_one_set_is_unbiased() {
        // All six ways to halve four points; the estimates' mean is zero exactly when the estimator has no bias.
        let all = Features::new(vec![1.0, 0.2, -0.4, 2.0, 0.3, 0.9, -1.1, 0.5], 2);
        let halves = [[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2], [1, 2, 0, 3], [1, 3, 0, 2], [2, 3, 0, 1]];
        let kids = halves.map(|order| kid(&all.select(&order[..2]), &all.select(&order[2..])).unwrap());
        let mean = kids.iter().sum::<f64>() / 6.0;
        assert!(mean.abs() < 1e-6, "{kids:?}");
        assert!(kids.iter().any(|kid| kid.abs() > 0.1), "{kids:?}");
    }

    #[test]
    fn retrieval_counts_the_nearest_direction_not_the_longest() {
        // Reference 1 points most nearly along query 0, reference 0 has the larger product.
        let references = Features::new(vec![100., 60., 1., 0., 0., 1.], 2);
        let queries = Features::new(vec![5., 0.1, 0., 3.], 2);
        let right = retrieval(&queries, &references, &[1, 2]).unwrap();
        assert_eq!(right, Retrieval { top1: 1.0, top5: 1.0 });
        assert_eq!(retrieval(&queries, &references, &[0, 2]).unwrap().top1, 0.5);
    }

    #[test]
    fn top_five_takes_the_fifth_and_not_the_sixth() {
        // Directions turning away from the query one by one.
        let references =
            (0..7).flat_map(|step| [(0.1 * step as f32).cos(), (0.1 * step as f32).sin()]).collect();
        let (query, references) = (Features::new(vec![1., 0., 1., 0.], 2), Features::new(references, 2));
        let found = retrieval(&query, &references, &[4, 5]).unwrap();
        assert_eq!(found, Retrieval { top1: 0.0, top5: 0.5 });
    }

    #[test]
    fn equal_references_score_chance() {
        let same = Features::new([1.0, 2.0].repeat(20), 2);
        let found = retrieval(&same, &same, &(0..20).collect::<Vec<_>>()).unwrap();
        assert!((found.top1 - 0.05).abs() < 1e-12 && (found.top5 - 0.25).abs() < 1e-12, "{found:?}");
    }
}
