//! One choice of instruction set, made at run time.
//!
//! A kernel is ordinary Rust over short arrays of lanes. [`dispatch`] compiles it once per instruction set, inside a
//! function with that set's `#[target_feature]`s, so that the compiler turns the lane loops into vector instructions,
//! and picks the widest set that the processor has. AVX2 and AVX-512 have the same lanes and both fuse multiplication
//! and addition, so they give the same bits.
//!
//! The environment variable `RGD_ISA` chooses another set, to test the code of other processors.

use std::sync::OnceLock;

/// The environment variable that names an instruction set.
pub const ENVIRONMENT: &str = "RGD_ISA";

/// Lanes of one step of a kernel, for every element type.
pub const LANES: usize = 16;

/// The properties of an instruction set that arithmetic depends on.
pub trait Isa: Copy {
    /// Whether `a * b + c` is one instruction.
    const FMA: bool;
}

/// A float that can be multiplied and added in one instruction.
pub trait MulAdd: Sized {
    /// `self * a + b`, rounded once if the instruction set can.
    #[must_use]
    fn mul_add<I: Isa>(self, a: Self, b: Self) -> Self;
}

macro_rules! mul_add {
    ($($t:ident)*) => {
        $(impl MulAdd for $t {
            #[inline(always)]
            fn mul_add<I: Isa>(self, a: Self, b: Self) -> Self {
                if I::FMA { $t::mul_add(self, a, b) } else { self * a + b }
            }
        })*
    };
}
mul_add!(f32 f64);

/// A computation that [`dispatch`] compiles for each instruction set. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// The computation.
    fn run<I: Isa>(self) -> Self::Output;
}

#[derive(Clone, Copy)]
pub(super) struct Fused;

impl Isa for Fused {
    const FMA: bool = true;
}

#[cfg(not(target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(super) struct Baseline;

#[cfg(not(target_arch = "aarch64"))]
impl Isa for Baseline {
    const FMA: bool = false;
}

/// An instruction set that this processor has: only [`InstructionSet::available`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstructionSet(Name);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
    Avx512,
    #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
    Avx2,
    // NEON and its fused multiply-add are part of every aarch64 target.
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(not(target_arch = "aarch64"))]
    Baseline,
}

impl InstructionSet {
    /// The instruction sets of this processor, the widest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Self(Name::Avx512));
            }
            found.push(Self(Name::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        found.push(Self(Name::Neon));
        #[cfg(not(target_arch = "aarch64"))]
        found.push(Self(Name::Baseline));
        found
    }

    /// Its name, as `RGD_ISA` spells it: "avx512", "avx2", "neon" or "baseline".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
            Name::Avx512 => "avx512",
            #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
            Name::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Name::Neon => "neon",
            #[cfg(not(target_arch = "aarch64"))]
            Name::Baseline => "baseline",
        }
    }

    /// The instruction set of this process: the widest, or the one that `RGD_ISA` names. The variable is read once.
    ///
    /// # Errors
    ///
    /// If `RGD_ISA` names no instruction set of this processor.
    pub fn chosen() -> Result<Self, &'static str> {
        static CHOSEN: OnceLock<Result<InstructionSet, String>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| {
                let wanted = std::env::var_os(ENVIRONMENT);
                Self::named(wanted.map(|wanted| wanted.to_string_lossy().into_owned()).as_deref())
            })
            .as_ref()
            .copied()
            .map_err(String::as_str)
    }

    fn named(wanted: Option<&str>) -> Result<Self, String> {
        let available = Self::available();
        let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty()) else { return Ok(available[0]) };
        available.iter().copied().find(|set| set.name() == wanted).ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|set| set.name()).collect();
            format!("{ENVIRONMENT} must be one that this processor has: {}, got '{wanted}'", names.join(", "))
        })
    }
}

/// Runs a kernel with the instruction set of this process: [`InstructionSet::chosen`].
///
/// # Panics
///
/// If `RGD_ISA` names no instruction set of this processor. The Python module then raises when it is imported.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    match InstructionSet::chosen() {
        Ok(set) => dispatch_on(set, kernel),
        Err(message) => panic!("{message}"),
    }
}

/// Runs a kernel with an instruction set.
#[inline]
fn dispatch_on<K: Kernel>(set: InstructionSet, kernel: K) -> K::Output {
    #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Fused>()
    }
    #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Fused>()
    }
    match set.0 {
        // SAFETY: only `available` makes an `InstructionSet`, and it asked the processor for every feature the
        // function enables.
        #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
        Name::Avx512 => unsafe { avx512(kernel) },
        // SAFETY: as above.
        #[cfg(all(target_arch = "x86_64", not(rgd_baseline_only)))]
        Name::Avx2 => unsafe { avx2(kernel) },
        #[cfg(target_arch = "aarch64")]
        Name::Neon => kernel.run::<Fused>(),
        #[cfg(not(target_arch = "aarch64"))]
        Name::Baseline => kernel.run::<Baseline>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_is_taken_where_none_is_named() {
        let available = InstructionSet::available();
        for wanted in [None, Some("")] {
            assert_eq!(InstructionSet::named(wanted), Ok(available[0]));
        }
    }

    #[test]
    fn each_that_the_processor_has_can_be_named() {
        for set in InstructionSet::available() {
            assert_eq!(InstructionSet::named(Some(set.name())), Ok(set));
        }
    }

    #[test]
    fn another_name_is_refused_with_the_names_there_are() {
        let message = InstructionSet::named(Some("sse9")).unwrap_err();
        assert!(message.starts_with("RGD_ISA must be one that this processor has: "), "{message}");
        assert!(message.ends_with(", got 'sse9'"), "{message}");
        for set in InstructionSet::available() {
            assert!(message.contains(set.name()), "{message}");
        }
    }

    struct SumOfProducts<'a>(&'a [f32]);
    impl Kernel for SumOfProducts<'_> {
        type Output = (bool, u32);
        #[inline(always)]
        fn run<I: Isa>(self) -> (bool, u32) {
            let mut sums = [0.0f32; LANES];
            for lanes in self.0.chunks_exact(LANES) {
                for (sum, &x) in sums.iter_mut().zip(lanes) {
                    *sum = MulAdd::mul_add::<I>(x, x, *sum);
                }
            }
            (I::FMA, sums.iter().sum::<f32>().to_bits())
        }
    }

    #[test]
    fn each_runs_and_those_that_fuse_give_the_same_bits() {
        let numbers: Vec<f32> = (1u16..=1024).map(|k| 1.0 / f32::from(k)).collect();
        let found: Vec<(bool, u32)> = InstructionSet::available()
            .into_iter()
            .map(|set| dispatch_on(set, SumOfProducts(&numbers)))
            .collect();
        let fused: Vec<u32> = found.iter().filter(|one| one.0).map(|one| one.1).collect();
        assert!(fused.windows(2).all(|pair| pair[0] == pair[1]), "{found:?}");
        for set in InstructionSet::available() {
            let (fma, _) = dispatch_on(set, SumOfProducts(&numbers));
            assert_eq!(fma, set.name() != "baseline");
        }
    }
}
