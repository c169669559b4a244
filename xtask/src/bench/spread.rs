//! What a number of samples says, and how sure it is.
//!
//! Invariant: the interval of a median holds the true one with a probability of at least 95 %, whatever the samples'
//! distribution (order statistics); with fewer than six there is no such interval, and all samples are in it.

/// A median with the spread of its samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub count: usize,
    pub median: f64,
    /// A quarter of the samples is below, a quarter above.
    pub quarter: f64,
    pub three_quarters: f64,
    /// Where the median is, with a probability of 95 %.
    pub low: f64,
    pub high: f64,
}

impl Spread {
    /// Of no samples it is not a number.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let at = |n: usize| sorted.get(n).copied().unwrap_or(f64::NAN);
        let last = count.saturating_sub(1);
        let off = outside(count);
        Self {
            count,
            median: f64::midpoint(at(last / 2), at(count / 2)),
            quarter: at(last / 4),
            three_quarters: at(last - last / 4),
            low: at(off),
            high: at(last - off.min(last)),
        }
    }
}

/// How many of `count` sorted samples may be left out on each side.
fn outside(count: usize) -> usize {
    if count > 500 {
        // The powers below have no number any more; the normal distribution is as good.
        let count = count as f64;
        return ((count - 1.96 * count.sqrt()) / 2.0) as usize - 1;
    }
    let mut left_out = 0;
    // The probability that at most that many are below the true median.
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut below = term;
    while 2.0 * (below + term * (count - left_out) as f64 / (left_out + 1) as f64) <= 0.05 {
        term *= (count - left_out) as f64 / (left_out + 1) as f64;
        below += term;
        left_out += 1;
    }
    if 2.0 * below <= 0.05 { left_out } else { 0 }
}

/// How many times as large the ones are as the others that were measured beside them.
pub fn ratio(ours: &[f64], theirs: &[f64]) -> Spread {
    let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
    Spread::of(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_sign_test() {
        // The usual table: 6 samples, all of them; 9, all but one each side; 20, the 6th to the 15th.
        assert_eq!([5, 6, 8, 9, 12, 20].map(outside), [0, 0, 0, 1, 2, 5]);
        assert!(outside(500).abs_diff(outside(501)) <= 2);
        assert_eq!(outside(10_000), 4901);
    }

    #[test]
    fn a_spread_is_of_its_samples() {
        let nine = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0];
        let spread = Spread::of(&nine);
        let told = [spread.median, spread.quarter, spread.three_quarters, spread.low, spread.high];
        assert_eq!(told.map(|one| one as i32), [5, 3, 7, 2, 8]);
        assert_eq!((Spread::of(&[1.0, 2.0]).median * 10.0) as i32, 15);
        assert!(Spread::of(&[]).median.is_nan());
    }

    #[test]
    fn ratios_are_of_samples_side_by_side() {
        // The machine became twice as slow in between.
        let spread = ratio(&[11.0, 22.0, 11.0], &[10.0, 20.0, 10.0]);
        assert!((spread.median - 1.1).abs() < 1e-9 && (spread.high - 1.1).abs() < 1e-9);
    }
}
