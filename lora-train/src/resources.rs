//! What a run takes: memory of the process, bytes on the disk.

use std::{fs, path::Path};

use lora_kernels::Device;

use crate::Result;

/// The most resident memory that this process has had, in bytes, mapped files that were touched included; `None` where the
/// system does not tell.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// What is computed on: the device where that is another, the processor of this machine, its vector instructions (names of
/// virtual machines' processors tell little else) and the threads.
pub(crate) fn machine(device: &Device) -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    let threads = rayon::current_num_threads();
    let plural = if threads == 1 { "" } else { "s" };
    let name = name.unwrap_or("processor without a name");
    let processor = format!("{name} ({}), {threads} thread{plural}", lora_kernels::cpu_instructions());
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => format!("{} ({device}), {processor}", gpu.info().name),
        _ => processor,
    }
}

/// The day, in UTC.
pub(crate) fn today() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()
}

/// Bytes of the safetensors files in a folder: what a trained result takes without its tokenizer.
///
/// # Errors
/// A folder that cannot be read.
pub fn weight_bytes(dir: &Path) -> Result<u64> {
    let read = |reason| lora_model::Error::Io { action: "read", path: dir.into(), reason };
    let mut bytes = 0;
    for entry in fs::read_dir(dir).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            bytes += fs::metadata(&path).map_err(read)?.len();
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_its_processor_and_the_device_that_it_computes_on() {
        let processor = machine(&Device::Cpu);
        assert!(processor.contains(" thread") && processor.contains(lora_kernels::cpu_instructions()), "{processor}");
        #[cfg(feature = "emulator")]
        {
            let on = machine(&Device::open("emulated").unwrap());
            assert!(on.ends_with(&format!("), {processor}")) && on.contains("emulated"), "{on}");
        }
    }
}
