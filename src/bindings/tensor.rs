//! Reads `NumPy` arrays and `DLPack` tensors as typed `ndarray` views; the only module that knows dtypes and devices.
//! An element with index `(i_1, ..., i_d)` lies at `data + itemsize sum_k i_k stride_k`.
//!
//! Nothing is copied and nothing is exported: Python allocates, kernels fill. The description of a `DLPack` tensor is
//! checked: its numbers must not contradict each other, and every element must have an address. It cannot be checked
//! whether the producer owns that memory.
//!
//! A [`Tensor`] keeps its producer's memory alive, so a view may be used for as long as the tensor it borrows from
//! exists. Rust cannot see Python's other references to that memory: as with every `NumPy` function, the caller
//! promises that nobody writes to an input or touches an output during a call. Outputs may be uninitialised, so their
//! elements are `MaybeUninit`. [`distinct`] refuses arguments of one call that share memory with an output.

use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDevice, DLDeviceType};
use dlpark::python::{ImportRequest, ImportedDlpack};
use dlpark::{DlpackFlags, tensor::TensorRef};
use half::{bf16, f16};
use ndarray::{ArrayViewD, ArrayViewMutD, Axis, IxDyn, ShapeBuilder};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyBufferError, PyException, PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyTuple};
use std::fmt;
use std::mem::MaybeUninit;

/// The element types kernels read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::I64 => "int64",
            Self::I32 => "int32",
        })
    }
}

/// A Rust type with a [`Dtype`].
pub trait HasDtype {
    const DTYPE: Dtype;
}

macro_rules! has_dtype {
    ($($t:ty => $d:ident),*) => {
        $(impl HasDtype for $t {
            const DTYPE: Dtype = Dtype::$d;
        })*
    };
}
has_dtype!(f64 => F64, f32 => F32, f16 => F16, bf16 => Bf16, i64 => I64, i32 => I32);

/// Host memory that belongs to Python, described.
pub struct Tensor<'py> {
    name: &'static str,
    data: *mut u8,
    shape: Vec<usize>,
    strides: Vec<isize>,
    dtype: Dtype,
    read_only: bool,
    /// The lowest address and the one past the highest; zeros without elements.
    span: (usize, usize),
    _owner: Owner<'py>,
}

#[expect(dead_code, reason = "kept alive")]
enum Owner<'py> {
    Numpy(Bound<'py, PyUntypedArray>),
    Dlpack(ImportedDlpack),
    Borrowed(Bound<'py, Borrowed>),
}

/// A `DLPack` tensor that was imported once, for any number of kernels to read: a capsule can be imported only once.
#[pyclass(frozen, module = "rgd._rgd")]
pub struct Borrowed(ImportedDlpack);

#[pymethods]
impl Borrowed {
    /// Imports an array that speaks `DLPack`, or a capsule; `name` is the argument's, for messages.
    #[new]
    fn new(name: &str, object: &Bound<PyAny>) -> PyResult<Self> {
        let imported = import(name, object)?;
        let described = Described::of(name, &imported)?;
        if let Some(dtype) = dtype_of(described.dtype) {
            described.checked(name, size_of_dtype(dtype))?;
        }
        Ok(Self(imported))
    }

    /// The lengths of the axes.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, Described::of("the tensor", &self.0)?.shape)
    }

    /// The name of the dtype, which need not be one that the kernels serve.
    #[getter]
    fn dtype(&self) -> PyResult<String> {
        Ok(dtype_name(Described::of("the tensor", &self.0)?.dtype))
    }
}

/// The layout of a tensor by its description: address of the first element, shape, and strides in elements.
struct Described<D> {
    data: *mut u8,
    shape: Vec<usize>,
    strides: Vec<isize>,
    dtype: D,
}

impl Described<DLDataType> {
    fn of(name: &str, imported: &ImportedDlpack) -> PyResult<Self> {
        let tensor = imported.validate().map_err(|error| invalid(name, &error))?;
        on_host(name, tensor.device())?;
        let strides = tensor.strides_or_compact().map_err(|error| invalid(name, &error))?;
        Ok(Self {
            data: address(name, &tensor)?,
            shape: tensor.shape().iter().map(|&n| n as usize).collect(),
            strides: strides.iter().map(|&s| s as isize).collect(),
            dtype: tensor.dtype(),
        })
    }
}

impl<D> Described<D> {
    /// Checks that each element has an address, and sets what producers may leave undefined: the strides of axes with
    /// one element, and the strides and the address of a tensor without elements.
    ///
    /// Also returns the lowest address and the one past the highest; zeros without elements.
    fn checked(mut self, name: &str, itemsize: usize) -> PyResult<(Self, (usize, usize))> {
        if self.shape.contains(&0) {
            // The strides of a contiguous tensor: `ndarray` allows no others in a view that may be written, and it
            // wants the product of the other axes to fit.
            let mut bytes = itemsize as isize;
            for (stride, &size) in self.strides.iter_mut().zip(&self.shape).rev() {
                *stride = bytes / itemsize as isize;
                let size = isize::try_from(size.max(1)).ok();
                bytes = size.and_then(|size| bytes.checked_mul(size)).ok_or_else(|| {
                    invalid(name, &"it has no elements, but the product of its other axes is too large")
                })?;
            }
            self.data = std::ptr::without_provenance_mut(itemsize);
            return Ok((self, (0, 0)));
        }
        for (stride, &size) in self.strides.iter_mut().zip(&self.shape) {
            if size == 1 {
                *stride = 0;
            }
        }
        if self.data.is_null() {
            return Err(PyValueError::new_err(format!(
                "{name} has elements and no data, as a fake or meta tensor has: give a tensor with values"
            )));
        }
        if !self.data.addr().is_multiple_of(itemsize) {
            return Err(unaligned(name));
        }
        match self.span(itemsize) {
            Some(span) => Ok((self, span)),
            None => Err(invalid(name, &"by its shape, strides and byte offset, elements have no address")),
        }
    }

    /// The lowest address and the one past the highest of a tensor with elements; `None` if they are no valid
    /// addresses, or if the number of elements or bytes overflows.
    fn span(&self, itemsize: usize) -> Option<(usize, usize)> {
        let (mut count, mut low, mut high) = (1isize, 0isize, 0isize);
        for (&stride, &size) in self.strides.iter().zip(&self.shape) {
            let size = isize::try_from(size).ok()?;
            count = count.checked_mul(size)?;
            let reach = stride.checked_mul((size - 1).max(0))?;
            low = low.checked_add(reach.min(0))?;
            high = high.checked_add(reach.max(0))?;
        }
        let itemsize = itemsize as isize;
        let (low, high) = (low.checked_mul(itemsize)?, high.checked_add(1)?.checked_mul(itemsize)?);
        high.checked_sub(low)?;
        Some((self.data.addr().checked_add_signed(low)?, self.data.addr().checked_add_signed(high)?))
    }
}

/// Imports an array that speaks `DLPack`, or a capsule, which is consumed.
fn import(name: &str, object: &Bound<PyAny>) -> PyResult<ImportedDlpack> {
    if let Ok(capsule) = object.cast::<PyCapsule>() {
        let is = |name| capsule.is_valid_checked(Some(name));
        if is(c"used_dltensor") || is(c"used_dltensor_versioned") {
            return Err(PyValueError::new_err(format!(
                "{name} is a DLPack capsule already consumed: one can be read once, so pass the array itself"
            )));
        }
        if !is(c"dltensor") && !is(c"dltensor_versioned") {
            return Err(PyTypeError::new_err(format!(
                "{name} must be an array or a DLPack capsule, got {}",
                object.repr()?
            )));
        }
    }
    let request =
        ImportRequest::new(object.as_borrowed()).map_err(|error| unreadable(name, object, error))?;
    if let Ok(device) = request.device() {
        on_host(name, device)?;
    }
    match request.import(None, None) {
        // A producer older than DLPack 1.0 does not take the arguments of version negotiation.
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) && object.hasattr("__dlpack__")? => {
            let capsule = object.call_method0("__dlpack__");
            capsule.and_then(|capsule| ImportRequest::new(capsule.as_borrowed())?.import(None, None))
        }
        imported => imported,
    }
    .map_err(|error| unreadable(name, object, error))
}

/// The error of a producer that could not lend its memory, with the argument's name and what to do.
fn unreadable(name: &str, object: &Bound<PyAny>, error: PyErr) -> PyErr {
    let py = object.py();
    if !error.is_instance_of::<PyException>(py) || error.is_instance_of::<PyMemoryError>(py) {
        return error;
    }
    let reason = error.value(py).to_string();
    let reason = reason.lines().next().unwrap_or_default();
    let kind = object.get_type().name().map(|kind| kind.to_string()).unwrap_or_default();
    let message = if reason.contains("DLPack major version") {
        format!(
            "{name} is a DLPack tensor of a version that rgd does not know ({reason}): lend it by version 1, as \
             {name}.__dlpack__(max_version=(1, 0)) does"
        )
    } else if object.cast::<PyCapsule>().is_err() && !object.hasattr("__dlpack__").unwrap_or(false) {
        format!("{name} must be a NumPy array or a tensor that speaks DLPack, got {kind}")
    } else {
        format!("{name}, a {kind}, cannot be read through DLPack: {reason}")
    };
    let unreadable = PyTypeError::new_err(message);
    unreadable.set_cause(py, Some(error));
    unreadable
}

impl<'py> Tensor<'py> {
    /// Reads the description of an array or tensor; `name` is the argument's, for messages.
    pub fn import(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            Self::from_numpy(name, array)
        } else if let Ok(borrowed) = object.cast::<Borrowed>() {
            let imported = &borrowed.get().0;
            Self::new(
                name,
                described(name, imported)?,
                is_read_only(imported),
                Owner::Borrowed(borrowed.clone()),
            )
        } else {
            let imported = import(name, object)?;
            let (described, read_only) = (described(name, &imported)?, is_read_only(&imported));
            Self::new(name, described, read_only, Owner::Dlpack(imported))
        }
    }

    fn new(
        name: &'static str,
        described: Described<Dtype>,
        read_only: bool,
        owner: Owner<'py>,
    ) -> PyResult<Self> {
        let itemsize = size_of_dtype(described.dtype);
        let (described, span) = described.checked(name, itemsize)?;
        let Described { data, shape, strides, dtype } = described;
        Ok(Self { name, data, shape, strides, dtype, read_only, span, _owner: owner })
    }

    fn from_numpy(name: &'static str, array: &Bound<'py, PyUntypedArray>) -> PyResult<Self> {
        let descr = array.dtype();
        let native = descr.is_native_byteorder() != Some(false);
        let dtype = match (descr.kind(), descr.itemsize()) {
            (b'f', 8) if native => Some(Dtype::F64),
            (b'f', 4) if native => Some(Dtype::F32),
            (b'f', 2) if native => Some(Dtype::F16),
            (b'i', 8) if native => Some(Dtype::I64),
            (b'i', 4) if native => Some(Dtype::I32),
            (b'V', 2) if descr.typeobj().name()? == "bfloat16" => Some(Dtype::Bf16),
            _ => None,
        };
        let Some(dtype) = dtype else {
            return Err(unsupported_dtype(name, &descr.to_string()));
        };
        let itemsize = descr.itemsize();
        let mut strides = Vec::with_capacity(array.ndim());
        for &bytes in array.strides() {
            if bytes % itemsize as isize != 0 {
                return Err(unaligned(name));
            }
            strides.push(bytes / itemsize as isize);
        }
        // SAFETY: a live NumPy array object, whose fields may be read while the interpreter is held.
        let raw = unsafe { &*array.as_array_ptr() };
        let writeable = raw.fields.flags & numpy::npyffi::NPY_ARRAY_WRITEABLE != 0;
        let shape = array.shape().to_vec();
        let described = Described { data: raw.fields.data.cast(), shape, strides, dtype };
        Self::new(name, described, !writeable, Owner::Numpy(array.clone()))
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Whether the other is the very same tensor: the same elements at the same addresses.
    pub fn is(&self, other: &Self) -> bool {
        self.data == other.data
            && self.dtype == other.dtype
            && self.shape == other.shape
            && self.strides == other.strides
    }

    /// A view of the elements.
    pub fn view<T: HasDtype>(&self) -> PyResult<ArrayViewD<'_, T>> {
        if T::DTYPE != self.dtype {
            return Err(PyTypeError::new_err(format!(
                "{} must be {}, got {}",
                self.name,
                T::DTYPE,
                self.dtype
            )));
        }
        let steps: Vec<usize> = self.strides.iter().map(|s| s.unsigned_abs()).collect();
        let mut first = self.data.cast::<T>();
        for (&stride, &size) in self.strides.iter().zip(&self.shape) {
            if stride < 0 {
                first = first.wrapping_offset(stride * (size as isize - 1));
            }
        }
        // SAFETY: the producer vouches for its description, `checked` for the address and its alignment; `first` is the
        // lowest element, from which axes of negative stride are then turned around.
        let mut view =
            unsafe { ArrayViewD::from_shape_ptr(IxDyn(&self.shape).strides(IxDyn(&steps)), first) };
        for (axis, &stride) in self.strides.iter().enumerate() {
            if stride < 0 {
                view.invert_axis(Axis(axis));
            }
        }
        Ok(view)
    }

    /// A view of an output's elements.
    pub fn view_mut<T: HasDtype>(&mut self) -> PyResult<ArrayViewMutD<'_, MaybeUninit<T>>> {
        if self.read_only {
            return Err(PyValueError::new_err(format!(
                "{} is read-only: give an array that may be written",
                self.name
            )));
        }
        if T::DTYPE != self.dtype {
            return Err(PyTypeError::new_err(format!(
                "{} must be {}, got {}",
                self.name,
                T::DTYPE,
                self.dtype
            )));
        }
        let mut axes: Vec<(usize, usize)> = Vec::with_capacity(self.shape.len());
        for (&stride, &size) in self.strides.iter().zip(&self.shape) {
            if stride < 0 {
                return Err(PyValueError::new_err(format!("{} must not have a negative stride", self.name)));
            }
            if size > 1 && !self.shape.contains(&0) {
                axes.push((stride as usize, size));
            }
        }
        axes.sort_unstable();
        let mut extent = 1;
        for (stride, size) in axes {
            if stride < extent {
                return Err(PyValueError::new_err(format!("{} must not overlap itself", self.name)));
            }
            extent = stride * size;
        }
        let steps: Vec<usize> = self.strides.iter().map(|&s| s as usize).collect();
        let first = self.data.cast::<MaybeUninit<T>>();
        // SAFETY: as in `view`; no two indices share an element, as just checked, and `distinct` has seen to it that no
        // other argument does.
        Ok(unsafe { ArrayViewMutD::from_shape_ptr(IxDyn(&self.shape).strides(IxDyn(&steps)), first) })
    }

    /// The elements of an output that lies in memory in row-major order.
    pub fn slice_mut<T: HasDtype>(&mut self) -> PyResult<&mut [MaybeUninit<T>]> {
        let name = self.name;
        self.view_mut()?
            .into_slice()
            .ok_or_else(|| PyValueError::new_err(format!("{name} must be contiguous")))
    }

    /// The elements of an input that lies in memory in row-major order.
    pub fn slice<T: HasDtype>(&self) -> PyResult<&[T]> {
        self.view()?
            .to_slice()
            .ok_or_else(|| PyValueError::new_err(format!("{} must be contiguous", self.name)))
    }
}

/// Refuses outputs that share memory with each other or with an input.
pub fn distinct(outputs: &[&Tensor], inputs: &[&Tensor]) -> PyResult<()> {
    for (i, output) in outputs.iter().enumerate() {
        let (low, high) = output.span;
        for other in outputs[i + 1..].iter().chain(inputs) {
            let (other_low, other_high) = other.span;
            if low < other_high && other_low < high {
                return Err(PyValueError::new_err(format!(
                    "{} and {} must not share memory",
                    output.name, other.name
                )));
            }
        }
    }
    Ok(())
}

/// The description of a tensor of a dtype that the kernels serve.
fn described(name: &str, imported: &ImportedDlpack) -> PyResult<Described<Dtype>> {
    let Described { data, shape, strides, dtype } = Described::of(name, imported)?;
    match dtype_of(dtype) {
        Some(dtype) => Ok(Described { data, shape, strides, dtype }),
        None => Err(unsupported_dtype(name, &dtype_name(dtype))),
    }
}

fn is_read_only(imported: &ImportedDlpack) -> bool {
    imported.flags().contains(DlpackFlags::READ_ONLY)
}

fn address(name: &str, tensor: &TensorRef) -> PyResult<*mut u8> {
    let data = tensor.data_ptr().cast_mut().cast::<u8>();
    let offset = usize::try_from(tensor.byte_offset()).ok().filter(|&offset| {
        // A null address stays null, for any offset.
        data.is_null() || data.addr().checked_add(offset).is_some()
    });
    match offset {
        Some(offset) => Ok(if data.is_null() { data } else { data.wrapping_add(offset) }),
        None => Err(invalid(name, &format!("its byte offset is {}", tensor.byte_offset()))),
    }
}

fn dtype_of(dtype: DLDataType) -> Option<Dtype> {
    if dtype.lanes != 1 {
        return None;
    }
    match (dtype.code, dtype.bits) {
        (DLDataTypeCode::FLOAT, 64) => Some(Dtype::F64),
        (DLDataTypeCode::FLOAT, 32) => Some(Dtype::F32),
        (DLDataTypeCode::FLOAT, 16) => Some(Dtype::F16),
        (DLDataTypeCode::BFLOAT, 16) => Some(Dtype::Bf16),
        (DLDataTypeCode::INT, 64) => Some(Dtype::I64),
        (DLDataTypeCode::INT, 32) => Some(Dtype::I32),
        _ => None,
    }
}

fn size_of_dtype(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F64 | Dtype::I64 => 8,
        Dtype::F32 | Dtype::I32 => 4,
        Dtype::F16 | Dtype::Bf16 => 2,
    }
}

fn dtype_name(dtype: DLDataType) -> String {
    let sized = |kind| format!("{kind}{}", dtype.bits);
    let name = match dtype.code {
        DLDataTypeCode::INT => sized("int"),
        DLDataTypeCode::UINT => sized("uint"),
        DLDataTypeCode::FLOAT => sized("float"),
        DLDataTypeCode::BFLOAT => sized("bfloat"),
        DLDataTypeCode::COMPLEX => sized("complex"),
        DLDataTypeCode::BOOL => "bool".into(),
        DLDataTypeCode::FLOAT8_E3M4 => "float8_e3m4".into(),
        DLDataTypeCode::FLOAT8_E4M3 => "float8_e4m3".into(),
        DLDataTypeCode::FLOAT8_E4M3B11FNUZ => "float8_e4m3b11fnuz".into(),
        DLDataTypeCode::FLOAT8_E4M3FN => "float8_e4m3fn".into(),
        DLDataTypeCode::FLOAT8_E4M3FNUZ => "float8_e4m3fnuz".into(),
        DLDataTypeCode::FLOAT8_E5M2 => "float8_e5m2".into(),
        DLDataTypeCode::FLOAT8_E5M2FNUZ => "float8_e5m2fnuz".into(),
        DLDataTypeCode::FLOAT8_E8M0FNU => "float8_e8m0fnu".into(),
        other => format!("DLPack type {} of {} bits", other.0, dtype.bits),
    };
    if dtype.lanes == 1 { name } else { format!("{name} in {} lanes", dtype.lanes) }
}

fn on_host(name: &str, device: DLDevice) -> PyResult<()> {
    let kind = match device.device_type {
        DLDeviceType::CPU | DLDeviceType::CUDAHOST | DLDeviceType::ROCMHOST => return Ok(()),
        DLDeviceType::CUDA => "cuda",
        DLDeviceType::CUDAMANAGED => "cuda (managed memory)",
        DLDeviceType::OPENCL => "opencl",
        DLDeviceType::VULKAN => "vulkan",
        DLDeviceType::METAL => "metal",
        DLDeviceType::VPI => "vpi",
        DLDeviceType::ROCM => "rocm",
        DLDeviceType::ONEAPI => "oneapi",
        DLDeviceType::WEBGPU => "webgpu",
        DLDeviceType::HEXAGON => "hexagon",
        DLDeviceType::MAIA => "maia",
        DLDeviceType::TRN => "trainium",
        other => &format!("DLPack device type {}", other.0),
    };
    Err(PyValueError::new_err(format!(
        "{name} must be on the CPU, got a tensor on {kind}:{}: move it there, as {name}.cpu() does in torch",
        device.device_id
    )))
}

fn unsupported_dtype(name: &str, dtype: &str) -> PyErr {
    PyTypeError::new_err(format!("{name} has dtype {dtype}, which the kernels do not serve"))
}

fn unaligned(name: &str) -> PyErr {
    PyValueError::new_err(format!("{name} is not aligned to its elements: give a copy of it"))
}

fn invalid(name: &str, error: &dyn std::fmt::Display) -> PyErr {
    PyBufferError::new_err(format!("{name} is no valid DLPack tensor: {error}"))
}
