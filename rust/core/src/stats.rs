//! Counts of values that are not finite. The only place where the core looks at values.

use crate::dtype::Dtype;

/// Returns how many of the values in `bytes` are NaN and how many infinite; integers have none.
pub fn not_finite(dtype: Dtype, bytes: &[u8]) -> (u64, u64) {
    match dtype {
        Dtype::F32 => {
            count(bytes, |chunk: [u8; 4]| u32::from_le_bytes(chunk) & 0x7fff_ffff, 0x7f80_0000)
        }
        Dtype::F16 => count(bytes, |chunk: [u8; 2]| u16::from_le_bytes(chunk) & 0x7fff, 0x7c00),
        Dtype::Bf16 => count(bytes, |chunk: [u8; 2]| u16::from_le_bytes(chunk) & 0x7fff, 0x7f80),
        Dtype::F64 => count(
            bytes,
            |chunk: [u8; 8]| u64::from_le_bytes(chunk) & 0x7fff_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
        ),
        // e4m3fn has one NaN, all ones, and no infinity.
        Dtype::F8E4M3 => (count(bytes, |[byte]: [u8; 1]| byte & 0x7f, 0x7e).0, 0),
        Dtype::F8E5M2 => count(bytes, |[byte]: [u8; 1]| byte & 0x7f, 0x7c),
        Dtype::I8
        | Dtype::I16
        | Dtype::I32
        | Dtype::I64
        | Dtype::U8
        | Dtype::U16
        | Dtype::U32
        | Dtype::U64
        | Dtype::Bool => (0, 0),
    }
}

/// Counts magnitudes above and equal to that of infinity.
fn count<const N: usize, T: PartialOrd + Copy>(
    bytes: &[u8],
    magnitude: impl Fn([u8; N]) -> T,
    infinity: T,
) -> (u64, u64) {
    let (chunks, _) = bytes.as_chunks::<N>();
    let (mut nan, mut infinities) = (0, 0);
    // Short runs with narrow counters, which the compiler turns into vector instructions.
    for run in chunks.chunks(128) {
        let (mut above, mut equal) = (0u8, 0u8);
        for &chunk in run {
            let value = magnitude(chunk);
            above += u8::from(value > infinity);
            equal += u8::from(value == infinity);
        }
        nan += u64::from(above);
        infinities += u64::from(equal);
    }
    (nan, infinities)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_infinity_are_counted_in_every_float_type() {
        let f32s: Vec<u8> = [1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -0.0]
            .iter()
            .flat_map(|value: &f32| value.to_bits().to_le_bytes())
            .collect();
        assert_eq!(not_finite(Dtype::F32, &f32s), (1, 2));
        let f64s: Vec<u8> = [f64::NAN, -f64::NAN, f64::INFINITY, 3.0]
            .iter()
            .flat_map(|value: &f64| value.to_bits().to_le_bytes())
            .collect();
        assert_eq!(not_finite(Dtype::F64, &f64s), (2, 1));
        let halves = |values: &[u16]| -> Vec<u8> {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        assert_eq!(not_finite(Dtype::Bf16, &halves(&[0x7f80, 0xff80, 0x7fc0, 0x3f80])), (1, 2));
        assert_eq!(not_finite(Dtype::F16, &halves(&[0x7c00, 0xfe00, 0x7bff])), (1, 1));
        assert_eq!(not_finite(Dtype::F8E4M3, &[0x7f, 0xff, 0x7e, 0]), (2, 0));
        assert_eq!(not_finite(Dtype::F8E5M2, &[0x7c, 0xfc, 0x7d, 0x7b]), (1, 2));
        assert_eq!(not_finite(Dtype::I32, &[0xff; 8]), (0, 0));
    }

    #[test]
    fn long_runs_do_not_overflow_their_counters() {
        assert_eq!(not_finite(Dtype::Bf16, &vec![0xff; 2 * 100_000]), (100_000, 0));
    }
}
