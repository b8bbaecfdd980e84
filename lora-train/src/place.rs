use lora_kernels::{DType, Device};

use crate::{Error, Result, TrainConfig};

/// Where a model computes, and in which type.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The device.
    pub device: Device,
    /// The type of the base's weights and of activations; on the CPU, of the base's matrices alone. What trains is kept in
    /// f32 in any case.
    pub dtype: DType,
    /// What a person should know: that `auto` found no CUDA device, and why.
    pub note: Option<String>,
}

impl Place {
    /// The host, in f32.
    pub const CPU: Place = Place { device: Device::Cpu, dtype: DType::F32, note: None };

    /// The place meant by `--device` (`cpu`, `cuda`, `cuda:N`, `auto`) and `--dtype` (`f32`, `bf16`, `f16`, or `auto`:
    /// bf16 on CUDA, else f32).
    ///
    /// # Errors
    /// [`Error::Option`] for an unknown name, or a type that the device does not compute in; that of
    /// [`Device::open`] when the device cannot be used, with what to install or to change.
    pub fn open(device: &str, dtype: &str) -> Result<Place> {
        let dtype = parse(dtype)?;
        let (device, note) = match device {
            "auto" => match Device::auto() {
                (device, None) => (device, None),
                // The advice to use the CPU has just been taken.
                (device, Some(why)) => {
                    (device, Some(format!("computing on the CPU: {why}").replace(", or use --device cpu", "")))
                }
            },
            name => (open(name)?, None),
        };
        let dtype = dtype.unwrap_or(if device.is_cpu() { DType::F32 } else { DType::Bf16 });
        if device.is_cpu() && dtype == DType::F16 {
            let why = match &note {
                Some(note) => format!("the CPU computes in f32 or bf16; {note}"),
                None => "the CPU computes in f32 or bf16; for f16 add --device cuda".into(),
            };
            return Err(Error::option("dtype", name(dtype), why));
        }
        Ok(Place { device, dtype, note })
    }

    /// The place of a run, and the run's configuration with the names of its device and its type where it says `auto`.
    ///
    /// A run keeps its type to its end, so that `auto` means the type of the run that is continued. Its device may change:
    /// parameters and moments are f32 on each, masks are the same, and results agree to rounding. `notes` gets what a
    /// person should know.
    pub(crate) fn of_run(
        config: &TrainConfig,
        earlier: Option<&TrainConfig>,
        notes: &mut Vec<String>,
    ) -> Result<(Place, TrainConfig)> {
        let kept = earlier.map(|run| run.dtype.as_str()).filter(|_| config.dtype == "auto");
        let place = Place::open(&config.device, kept.unwrap_or(&config.dtype)).map_err(|e| match e {
            Error::Option { option: "dtype", value, why } if kept.is_some() => {
                let why = format!("so the run was started, and so it has to go on; {why}");
                Error::Option { option: "dtype", value, why }
            }
            e => e,
        })?;
        notes.extend(place.note.clone());
        let device = place.device.to_string();
        // What an older version wrote may be a choice yet to be made.
        if let Some(before) = earlier.map(|run| &run.device).filter(|d| **d != device && *d != "auto" && *d != "cuda") {
            notes
                .push(format!("the run was on {before} so far; from here on it agrees with {before} only to rounding"));
        }
        let run = TrainConfig { device, dtype: name(place.dtype).into(), ..config.clone() };
        Ok((place, run))
    }

    /// Checks both names without opening anything.
    pub(crate) fn check(device: &str, dtype: &str) -> Result<()> {
        parse(dtype)?;
        let number = device.strip_prefix("cuda:").is_some_and(|n| n.parse::<usize>().is_ok());
        match device {
            "cpu" | "cuda" | "auto" => Ok(()),
            "emulated" if cfg!(feature = "emulator") => Ok(()),
            _ if number => Ok(()),
            _ => Err(Error::option("device", device, "a device is cpu, cuda, cuda:N or auto")),
        }
    }
}

fn open(name: &str) -> Result<Device> {
    Device::open(name).map_err(|e| match e {
        lora_kernels::Error::UnknownDevice { .. } => {
            Error::option("device", name, "a device is cpu, cuda, cuda:N or auto")
        }
        e => e.into(),
    })
}

/// The type of a name; `None` for `auto`.
fn parse(dtype: &str) -> Result<Option<DType>> {
    match dtype {
        "auto" => Ok(None),
        "f32" => Ok(Some(DType::F32)),
        "bf16" => Ok(Some(DType::Bf16)),
        "f16" => Ok(Some(DType::F16)),
        _ => Err(Error::option("dtype", dtype, "a type is f32, bf16, f16 or auto (bf16 on CUDA, else f32)")),
    }
}

/// The name of a type.
pub(crate) fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        _ => "f32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_by_name() {
        assert_eq!(Place::open("cpu", "auto").unwrap(), Place::CPU);
        assert_eq!(Place::open("cpu", "f32").unwrap(), Place::CPU);
        assert_eq!(Place::open("cpu", "bf16").unwrap().dtype, DType::Bf16);
        let auto = Place::open("auto", "auto").unwrap();
        assert_eq!(auto.note.is_some(), auto.device.is_cpu(), "falling back is said");
        assert_eq!(auto.dtype, if auto.device.is_cpu() { DType::F32 } else { DType::Bf16 });
        for (device, dtype, says) in [
            ("gpu", "f32", "cuda:N"),
            ("cuda:x", "f32", "cuda:N"),
            ("cpu", "int4", "bf16"),
            ("cpu", "f16", "--device cuda"),
            ("cuda:4000", "f32", "CUDA"),
        ] {
            let e = Place::open(device, dtype).unwrap_err().to_string();
            assert!(e.contains(says), "{device} {dtype}: {e}");
        }
        assert!(Place::check("cuda:3", "bf16").is_ok() && Place::check("cuda:", "f32").is_err());
    }
}
