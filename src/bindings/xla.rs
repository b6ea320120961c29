//! The fused cross-entropy as a custom call of XLA on the CPU, through its foreign function interface (FFI).
//!
//! A row has logits `x`, a label `y` and settings `(norm, smoothing, z, numbers...)`. For each row the call writes the
//! loss `l`, its weight `w` and the gradient of `norm (w l + z Z^2)`, which may overwrite the logits. It also writes
//! `Z`, the logsumexp of the row, if the fourth result has elements. The attribute `kind` names the weighting of these
//! numbers, which must be pointwise. The fourth operand is added to the logits of each class: its shape is `(..., C)`
//! for rows of shape `(..., n)`, or `(..., 0)` for no adjustment.
//!
//! XLA guarantees that buffers are dense, row-major and aligned, and live as long as the call. An output shares memory
//! with an input only if the caller of `jax.ffi.ffi_call` allowed it, and is then the same buffer. Outputs are
//! uninitialised, and a buffer without elements may be null. This module writes only to outputs and, in XLA's
//! structures, to fields within their stated size. No panic crosses the boundary. It starts no thread: it runs blocks
//! of rows on the threads of XLA's own pool.

use super::xla_api::{
    Api, Attributes, BF16, Buffers, ByteSpan, CallFrame, ErrorCreateArgs, Extension, F16, F32, F64, INTERNAL,
    INVALID_ARGUMENT, METADATA, Metadata, MetadataExtension, RESOURCE_EXHAUSTED, S32, STRING, XlaError,
};
use super::xla_pool::Pool;
use crate::cross_entropy::{
    Gradient, Inputs, NormedOutputs, Overwrite, Reduction, Settings, Target, with_norms,
};
use crate::layout::Shared;
use crate::numeric::{Element, Real};
use crate::parallel::Stop;
use crate::weightings::Weighting;
use half::{bf16, f16};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};
use pyo3::prelude::*;
use std::ffi::{CString, c_int, c_void};
use std::mem::{MaybeUninit, offset_of, size_of};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, PoisonError};

/// The label of a row that takes no part.
const IGNORED: i32 = -1;

/// Logits that are worked on at a time: they stay in cache.
const BLOCK: usize = 1 << 15;

/// The handler: XLA calls it to learn its version, and then to run it.
///
/// # Safety
/// `frame` is null or points to a call frame of XLA's.
unsafe extern "C" fn handler(frame: *mut CallFrame) -> *mut c_void {
    // SAFETY: what the caller promises.
    let Some(frame) = (unsafe { frame.as_ref() }) else { return null_mut() };
    // SAFETY: the extensions are a list of XLA's; the metadata one is written within its stated size.
    if unsafe { answer_metadata(frame.extensions) } {
        return null_mut();
    }
    // SAFETY: the frame describes the buffers of a call that is under way.
    let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { run(frame) }));
    let (message, code) = match outcome {
        Ok(Ok(())) => return null_mut(),
        Ok(Err(message)) => (message, INVALID_ARGUMENT),
        Err(panic) => match panic.downcast_ref::<Stop>() {
            Some(Stop::OutOfMemory(bytes)) => {
                (format!("could not allocate {bytes} bytes of working memory"), RESOURCE_EXHAUSTED)
            }
            _ => ("a kernel panicked".to_owned(), INTERNAL),
        },
    };
    // SAFETY: outside the metadata query, which comes without one, the frame has XLA's table of functions.
    unsafe { error(frame.api, &format!("rgd.cross_entropy: {message}"), code).cast() }
}

unsafe fn answer_metadata(mut extension: *mut Extension) -> bool {
    // SAFETY: a list of XLA's, of which each entry begins as `Extension` does and says its kind.
    unsafe {
        while let Some(entry) = extension.as_ref() {
            if entry.kind == METADATA {
                let metadata = (*extension.cast::<MetadataExtension>()).metadata;
                if !metadata.is_null() && (*metadata).struct_size >= offset_of!(Metadata, traits) + 4 {
                    (*metadata).api_version.major = 0;
                    (*metadata).api_version.minor = 1;
                    (*metadata).traits = 0;
                }
                return true;
            }
            extension = entry.next;
        }
    }
    false
}

unsafe fn error(api: *const Api, message: &str, code: c_int) -> *mut XlaError {
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    let mut args = ErrorCreateArgs {
        struct_size: size_of::<ErrorCreateArgs>(),
        extensions: null_mut(),
        message: message.as_ptr(),
        code,
    };
    // SAFETY: the table is XLA's, or null; XLA copies the message before it returns.
    unsafe {
        api.as_ref().and_then(|api| api.error_create).map_or(null_mut(), |create| create(&raw mut args))
    }
}

/// A buffer's dtype, dimensions and address.
struct Memory<'a> {
    dtype: c_int,
    dims: &'a [i64],
    data: *mut c_void,
}

impl Memory<'_> {
    unsafe fn of(buffers: &Buffers, index: usize) -> Memory<'_> {
        // SAFETY: the caller checked `index` against the number of buffers, all of which are XLA's.
        unsafe {
            let buffer = &**buffers.data.add(index);
            let dims = match buffer.rank {
                0 => &[],
                rank => std::slice::from_raw_parts(buffer.dims, rank as usize),
            };
            Memory { dtype: buffer.dtype, dims, data: buffer.data }
        }
    }

    fn elements(&self) -> usize {
        self.dims.iter().map(|&d| d as usize).product()
    }

    /// The uninitialised elements of a result; without elements an empty slice, for any address.
    unsafe fn uninit<'b, T>(&self) -> &'b mut [MaybeUninit<T>] {
        let (data, count) = (self.data.cast::<MaybeUninit<T>>(), self.elements());
        // SAFETY: the buffer holds as many elements of the dtype, which the caller checked, and is this call's alone.
        if count == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(data, count) } }
    }

    /// The elements; without elements an empty slice, for any address.
    unsafe fn slice<T>(&self) -> &[T] {
        let (data, count) = (self.data.cast::<T>().cast_const(), self.elements());
        // SAFETY: the buffer holds as many elements of the dtype, which the caller checked, and no one writes them.
        if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data, count) } }
    }
}

unsafe fn run(frame: &CallFrame) -> Result<(), String> {
    if frame.args.size != 4 || frame.rets.size != 4 {
        return Err(format!(
            "expected 4 operands and 4 results, got {} and {}",
            frame.args.size, frame.rets.size
        ));
    }
    // SAFETY: the frame's attributes are XLA's.
    let kind = unsafe { text_attribute(&frame.attributes, "kind") }
        .ok_or("the call must have the string attribute 'kind', the name of a weighting")?;
    // SAFETY: there are as many buffers.
    let [logits, labels, settings, adjustment] = unsafe { [0, 1, 2, 3].map(|i| Memory::of(&frame.args, i)) };
    // SAFETY: as above.
    let outputs = unsafe { [0, 1, 2, 3].map(|i| Memory::of(&frame.rets, i)) };
    let Some((&classes, rows)) = logits.dims.split_last() else {
        return Err("logits have no class axis".into());
    };
    let Some((&width, settings_rows)) = settings.dims.split_last() else {
        return Err(
            "settings have no last axis: expected norm, label smoothing, z-loss and the weighting's numbers"
                .into(),
        );
    };
    let adjustment_fits = adjustment.dims.split_last().is_some_and(|(&count, parts)| {
        (count == classes || count == 0) && rows.starts_with(parts) && adjustment.dtype == settings.dtype
    });
    let gradient_shape = [rows, &[classes]].concat();
    if labels.dtype != S32
        || labels.dims != rows
        || settings_rows != rows
        || width < 3
        || !adjustment_fits
        || outputs[0].dims != rows
        || outputs[1].dims != rows
        || outputs[2].dims != gradient_shape
        || outputs[2].dtype != logits.dtype
        || !(outputs[3].dims == rows || outputs[3].elements() == 0)
        || [0, 1, 3].into_iter().any(|i| outputs[i].dtype != settings.dtype)
        || settings.dtype != if logits.dtype == F64 { F64 } else { F32 }
    {
        return Err("operands and results do not fit each other".into());
    }
    let call = Call {
        logits: &logits,
        labels: &labels,
        settings: &settings,
        adjustment: &adjustment,
        outputs: &outputs,
        classes: classes as usize,
        width: width as usize,
        kind,
        // SAFETY: the table and the context are those of the call.
        pool: unsafe { Pool::new(frame.api, frame.context) },
    };
    // SAFETY: shapes and dtypes were checked.
    unsafe {
        match logits.dtype {
            F32 => fill::<f32>(&call),
            F64 => fill::<f64>(&call),
            F16 => fill::<f16>(&call),
            BF16 => fill::<bf16>(&call),
            other => Err(format!("logits must be f16, bf16, f32 or f64, got data type {other}")),
        }
    }
}

/// The string attribute of this name.
unsafe fn text_attribute<'a>(attributes: &'a Attributes, name: &str) -> Option<&'a str> {
    for i in 0..usize::try_from(attributes.size).unwrap_or(0) {
        // SAFETY: XLA gives `size` kinds, names and values; a string's value is a span of bytes.
        unsafe {
            if *attributes.kinds.add(i) == STRING && (**attributes.names.add(i)).bytes() == name.as_bytes() {
                let value = (*attributes.values.add(i)).cast::<ByteSpan>();
                return std::str::from_utf8((*value).bytes()).ok();
            }
        }
    }
    None
}

/// A call whose shapes and dtypes fit.
struct Call<'a> {
    logits: &'a Memory<'a>,
    labels: &'a Memory<'a>,
    settings: &'a Memory<'a>,
    /// The adjustment of the logits of each class, the same for all rows of a part, or empty.
    adjustment: &'a Memory<'a>,
    outputs: &'a [Memory<'a>; 4],
    classes: usize,
    /// How many settings a row has: its norm, its label smoothing, its z-loss and the numbers of the weighting.
    width: usize,
    kind: &'a str,
    pool: Pool<'a>,
}

unsafe fn fill<T: Element>(call: &Call) -> Result<(), String> {
    let Call { classes, width, kind, .. } = *call;
    let rows = call.labels.elements();
    // An unknown member, or one that is not pointwise, is refused also if there are no rows.
    let read = |numbers: &[f64]| -> Result<Weighting, String> {
        let weighting = Weighting::new(kind, numbers).map_err(|error| error.to_string())?;
        if weighting.is_pointwise() {
            return Ok(weighting);
        }
        Err(format!(
            "weights of kind '{kind}' with these numbers depend on the whole batch: only pointwise weights fit"
        ))
    };
    if rows == 0 || classes == 0 {
        return read(&vec![0.0; width - 3]).map(|_| ());
    }
    // SAFETY: checked shapes and dtypes.
    let (labels, settings) = unsafe { (call.labels.slice::<i32>(), call.settings.slice::<T::Real>()) };
    // SAFETY: as above.
    let adjustment = unsafe { call.adjustment.slice::<T::Real>() };
    let adjusted = if adjustment.is_empty() { rows } else { rows / (adjustment.len() / classes) };
    let [losses, weights, grad, logsumexp] = call.outputs;
    // SAFETY: checked shapes and dtypes; results do not overlap.
    let [losses, weights, logsumexp] =
        unsafe { [losses, weights, logsumexp].map(|out| out.uninit::<T::Real>()) };
    let (x, grad) = (call.logits.data.cast::<T>(), grad.data.cast::<T>());
    let in_place = x == grad;
    let block = (BLOCK / classes).max(1);
    let settings_of = |row: usize| settings[width * row..width * (row + 1)].split_at(1);

    // Each part has one weighting, smoothing, z-loss and adjustment. The parts do not depend on the threads.
    let mut parts = Vec::new();
    let mut start = 0;
    while start < rows {
        let own = settings_of(start).1;
        let limit = rows.min(start + block).min((start / adjusted + 1) * adjusted);
        let end = (start + 1..limit).find(|&row| settings_of(row).1 != own).unwrap_or(limit);
        parts.push(start..end);
        start = end;
    }
    let to = Shared(x);
    let (losses, weights) = (Shared(losses.as_mut_ptr()), Shared(weights.as_mut_ptr()));
    let logsumexp = (!logsumexp.is_empty()).then_some(Shared(logsumexp.as_mut_ptr()));
    let grad = Shared(grad);
    let failed = Mutex::new(None);
    let fill_part = |part: Range<usize>| -> Result<(), String> {
        let own: Vec<f64> = settings_of(part.start).1.iter().map(|number| number.to_f64()).collect();
        let outside = |&label: &i32| label != IGNORED && !(0..classes as i64).contains(&i64::from(label));
        let within = |label: &i32| if outside(label) { IGNORED } else { *label };
        let clean: Vec<i32> = labels[part.clone()].iter().map(within).collect();
        let norms: Vec<T::Real> = part.clone().map(|row| settings_of(row).0[0]).collect();
        let shape = (part.len(), classes);
        // SAFETY: rows of two buffers of `rows` rows each, which are one buffer or do not overlap. XLA allows a result
        // to be written, and nothing but this part touches these rows.
        let (logits, memory, gradient) = unsafe {
            let (x, grad) = (to.address(part.start * classes), grad.address(part.start * classes));
            let gradient = if in_place {
                Gradient::InPlace(Overwrite::granted())
            } else {
                Gradient::Separate(ArrayViewMut2::from_shape_ptr(shape, grad.cast()).into_dyn())
            };
            (ArrayView2::from_shape_ptr(shape, x.cast_const()).into_dyn(), grad, gradient)
        };
        let inputs = Inputs {
            logits,
            target: Target::Int32(ArrayView1::from(&clean[..]).into_dyn()),
            class_weight: None,
            logit_adjustment: adjustment.chunks_exact(classes).nth(part.start / adjusted),
            measure: None,
        };
        let settings = Settings {
            ignore_index: i64::from(IGNORED),
            label_smoothing: own[0],
            z_loss: own[1],
            per_sample: false,
            reduction: Reduction::Sum,
            normalizer: None,
            threads: 1,
        };
        // SAFETY: the entries of this part's rows, which nothing else touches.
        let (losses, weights, mut logsumexp) = unsafe {
            let of_part = |out: &Shared<MaybeUninit<T::Real>>| out.part(part.start, part.end);
            (of_part(&losses), of_part(&weights), logsumexp.as_ref().map(of_part))
        };
        let out = NormedOutputs { losses, weights, logsumexp: logsumexp.as_deref_mut(), grad: gradient };
        with_norms(&inputs, read(&own[2..])?, &settings, &norms, out).map_err(|error| error.to_string())?;
        for (i, &label) in labels[part].iter().enumerate() {
            let nan = T::Real::from_f64(f64::NAN);
            if outside(&label) {
                losses[i].write(nan);
                weights[i].write(nan);
                if let Some(logsumexp) = &mut logsumexp {
                    logsumexp[i].write(nan);
                }
            }
            if outside(&label) || label == IGNORED {
                // Masked logits may be NaN, and 0 * NaN is NaN.
                let g = T::narrow(if label == IGNORED { T::Real::default() } else { nan });
                for k in i * classes..(i + 1) * classes {
                    // SAFETY: an element of this part's rows of the gradient.
                    unsafe { memory.add(k).write(g) };
                }
            }
        }
        Ok(())
    };
    call.pool.for_each(parts.len(), &|i| {
        if let Err(message) = fill_part(parts[i].clone()) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// The XLA FFI handler of the fused cross-entropy, in the capsule that `jax.ffi.register_ffi_target` takes.
#[pyfunction]
pub(super) fn xla_handler(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let handler: unsafe extern "C" fn(*mut CallFrame) -> *mut c_void = handler;
    // SAFETY: the interpreter is attached, the address is that of a function, which lives as long as the module's code,
    // and a capsule without a name is what jax expects.
    unsafe {
        let capsule = pyo3::ffi::PyCapsule_New(handler as *mut c_void, null(), None);
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bindings::xla_api::ApiVersion;

    #[test]
    fn the_metadata_query_is_answered_without_an_api_and_within_its_size() {
        let mut metadata = Metadata {
            struct_size: size_of::<Metadata>(),
            api_version: ApiVersion { struct_size: 24, extensions: null_mut(), major: 7, minor: 7 },
            traits: 7,
        };
        let mut extension = MetadataExtension {
            base: Extension { struct_size: 32, kind: METADATA, next: null_mut() },
            metadata: &raw mut metadata,
        };
        let none =
            || Buffers { struct_size: 40, extensions: null_mut(), size: 0, kinds: null(), data: null() };
        let mut frame = CallFrame {
            struct_size: size_of::<CallFrame>(),
            extensions: (&raw mut extension).cast(),
            api: null(),
            context: null_mut(),
            stage: 0,
            args: none(),
            rets: none(),
            attributes: Attributes {
                struct_size: 48,
                extensions: null_mut(),
                size: 0,
                kinds: null(),
                names: null(),
                values: null(),
            },
        };
        // SAFETY: a frame as XLA makes one for the query.
        assert!(unsafe { handler(&raw mut frame) }.is_null());
        // SAFETY: written through the same address.
        let (major, minor, traits) = unsafe {
            let metadata = &*extension.metadata;
            (metadata.api_version.major, metadata.api_version.minor, metadata.traits)
        };
        assert_eq!((major, minor, traits), (0, 1, 0));
        // SAFETY: null is allowed.
        assert!(unsafe { handler(null_mut()) }.is_null());
    }

    #[test]
    fn a_string_attribute_is_found_by_its_name_among_others() {
        let span = |text: &'static str| ByteSpan { data: text.as_ptr(), size: text.len() };
        let (names, value, number) = ([span("width"), span("kind")], span("kl"), 7i32);
        let names: [*const ByteSpan; 2] = [&raw const names[0], &raw const names[1]];
        let values: [*const c_void; 2] = [(&raw const number).cast(), (&raw const value).cast()];
        let kinds = [3, STRING];
        let attributes = Attributes {
            struct_size: 48,
            extensions: null_mut(),
            size: 2,
            kinds: kinds.as_ptr(),
            names: names.as_ptr(),
            values: values.as_ptr(),
        };
        // SAFETY: attributes as XLA lays them out.
        let [kind, width, other] =
            unsafe { ["kind", "width", "other"].map(|name| text_attribute(&attributes, name)) };
        assert_eq!((kind, width, other), (Some("kl"), None, None));
    }
}
