//! The compile gate: what NVRTC and the disassembler say of every kernel, on a machine that may have no GPU.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use rayon::prelude::*;

use super::{Arch, Module, nvrtc, prebuilt};
use crate::cuda::{modules, testing::missing};

/// How many threads a multiprocessor must be able to hold, as far as its 65,536 registers go: 64 for each. That is half of
/// what it can hold at most, and keeps enough loads under way to fill the memory's bandwidth.
const RESIDENT: usize = 1024;

/// Kernels that hide latency by work of their own instead, by the start of their names: registers are their tiles.
const RESIDENT_OF: &[(&str, usize)] = &[
    // Rows, and sums of columns, in registers.
    ("norm_backward_", 320),
    ("norm_", 512),
    // Many 128-bit loads each.
    ("rope_", 768),
    ("scatter_", 768),
    ("silu_gate_backward_", 768),
    // Tiles of the product: two blocks of 256 threads.
    ("simt_", 512),
    ("mma_", 512),
    // Three blocks of 128 threads, which hold up to 64 columns of two sums.
    ("lora_up_", 384),
    ("lora_", 512),
    // One block, whose consumers take registers from its producer.
    ("wgmma_", 384),
    // Sums of eight rows at once.
    ("gemv_nn_8_", 512),
    ("gemv_nt_8_", 768),
    // Queries, scores and outputs of a warp; longer heads need more.
    ("attention_64_", 384),
    ("attention_join_", 768),
    // As many as a thread can have: here only spills are watched.
    ("attention_", 256),
];

/// What the assembler reports of one kernel.
#[derive(Debug, Default, PartialEq, Eq)]
struct Usage {
    registers: usize,
    /// Bytes of stack frame, spill stores and spill loads.
    local: [usize; 3],
}

/// The kernels and other functions in a log of `ptxas -v`.
fn usages(log: &str) -> BTreeMap<String, Usage> {
    let mut usages = BTreeMap::<String, Usage>::new();
    let (mut kernel, mut function) = (String::new(), String::new());
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().unwrap_or_default().into();
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name.trim().into();
        } else if line.contains("bytes stack frame") {
            let numbers: Vec<usize> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
            usages.entry(function.clone()).or_default().local = numbers.try_into().expect("three numbers of bytes");
        } else if let Some((_, rest)) = line.split_once("Used ") {
            let registers = rest.split_whitespace().next().and_then(|n| n.parse().ok());
            usages.entry(kernel.clone()).or_default().registers = registers.expect("a number of registers");
        }
    }
    usages
}

/// The threads of a block by kernel, as the launch bounds in its PTX say.
fn bounds(ptx: &str) -> BTreeMap<&str, usize> {
    let kernels = ptx.split(".entry ").skip(1).filter_map(|text| {
        let name = text.split('(').next()?;
        let (_, bounds) = text.split('{').next()?.split_once(".maxntid ")?;
        let threads =
            bounds.split(['\n', '.']).next()?.split(',').map(|n| n.trim().parse::<usize>().unwrap()).product();
        Some((name, threads))
    });
    kernels.collect()
}

/// Lines of a log that a correct and fast kernel does not cause, such as that the assembler serialises wgmma. Constants of
/// shared headers that a module has no use for (#177-D) are no fault.
fn warnings(log: &str) -> impl Iterator<Item = &str> {
    let matters =
        |line: &str| ["warning #", "ptxas warning", "Performance Loss"].iter().any(|text| line.contains(text));
    log.lines().filter(move |line| matters(line) && !line.contains("#177-D"))
}

/// What is wrong with one kernel's use of registers and memory.
fn excess(kernel: &str, usage: &Usage, threads: Option<usize>) -> Option<String> {
    if usage.local != [0; 3] {
        let [stack, stores, loads] = usage.local;
        return Some(format!("{stack} bytes of stack, {stores} bytes of spill stores, {loads} of spill loads"));
    }
    let Some(threads) = threads else { return Some("no launch bounds".into()) };
    let resident = RESIDENT_OF.iter().find(|(start, _)| kernel.starts_with(start)).map_or(RESIDENT, |&(_, n)| n);
    // A multiprocessor gives registers out in eights.
    let budget = 65536 / resident.max(threads) / 8 * 8;
    (usage.registers > budget)
        .then(|| format!("{} registers; {resident} threads on a multiprocessor may have {budget}", usage.registers))
}

/// The instructions of a cubin by kernel, as nvdisasm prints them.
fn disassemble(nvdisasm: &Path, cubin: &[u8]) -> HashMap<String, Vec<String>> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = env::temp_dir().join(format!("lora-gate-{}-{count}.cubin", std::process::id()));
    fs::write(&file, cubin).unwrap();
    let output = Command::new(nvdisasm).arg("-c").arg(&file).output().unwrap();
    fs::remove_file(&file).unwrap();
    assert!(output.status.success(), "nvdisasm: {}", String::from_utf8_lossy(&output.stderr));
    instructions(&String::from_utf8_lossy(&output.stdout))
}

fn instructions(sass: &str) -> HashMap<String, Vec<String>> {
    let mut kernels = HashMap::<String, Vec<String>>::new();
    let mut kernel = String::new();
    for line in sass.lines() {
        if let Some(name) = line.strip_prefix(".text.").and_then(|l| l.trim_end().strip_suffix(':')) {
            kernel = name.into();
            kernels.entry(kernel.clone()).or_default();
        } else if let Some((_, code)) = line.split_once("*/").filter(|_| line.trim_start().starts_with("/*")) {
            // A guard such as @!P0 may stand before the operation.
            let operation = code.split_whitespace().find(|w| !w.starts_with('@'));
            kernels.entry(kernel.clone()).or_default().extend(operation.map(|o| o.trim_end_matches(';').to_owned()));
        }
    }
    kernels
}

/// What is wrong with a kernel's instructions.
fn faults(module: &Module, operations: &[String]) -> Option<String> {
    let local = operations.iter().filter(|o| o.starts_with("LDL") || o.starts_with("STL")).count();
    if local > 0 {
        return Some(format!("{local} accesses to local memory"));
    }
    if operations.is_empty() {
        return Some("no instructions".into());
    }
    let wgmma = operations.iter().any(|o| o.starts_with("HGMMA"));
    (module.arch == Arch::Sm90a && !wgmma).then(|| "no HGMMA".into())
}

/// NVIDIA's disassembler: `$LORA_NVDISASM`, or in `PATH`, or beside NVRTC where Python packages put both.
fn nvdisasm() -> Option<PathBuf> {
    let folders = |name| env::var_os(name).map(|v| env::split_paths(&v).collect::<Vec<_>>()).unwrap_or_default();
    let beside = folders("LD_LIBRARY_PATH").into_iter().map(|folder| folder.join("../bin"));
    let found = folders("PATH").into_iter().chain(beside).map(|folder| folder.join("nvdisasm"));
    env::var_os("LORA_NVDISASM").map(PathBuf::from).into_iter().chain(found).find(|path| path.is_file())
}

#[test]
fn gate_every_kernel_compiles_without_spills_and_within_its_registers() {
    let version = match nvrtc::compiler() {
        Ok(compiler) => compiler.version,
        Err(_) => return missing("no libnvrtc"),
    };
    let nvdisasm = nvdisasm();
    if nvdisasm.is_none() {
        missing("no nvdisasm");
    }
    let jobs = modules::ALL.iter().flat_map(|&module| {
        let archs: &[_] = if module.arch == Arch::Any { &["sm_80", "sm_90", "sm_90a"] } else { &["sm_90a"] };
        archs.iter().map(move |&arch| (module, arch))
    });
    let checked: Vec<(String, Vec<String>)> = jobs
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|(module, arch)| {
            let compiled = match nvrtc::compile(module, arch) {
                Ok(compiled) => compiled,
                Err(e) => return (String::new(), vec![e.to_string()]),
            };
            let place = format!("{} {arch}", module.name);
            let mut wrong: Vec<_> = warnings(&compiled.log).map(|line| format!("{place}: {line}")).collect();
            let ptx = std::str::from_utf8(&compiled.ptx).unwrap();
            let (usages, bounds) = (usages(&compiled.log), bounds(ptx));
            // Code for 9.0 is that for 9.0a as far as local memory goes.
            let code = nvdisasm.as_ref().filter(|_| arch != "sm_90").map(|path| disassemble(path, &compiled.cubin));
            let mut most = 0;
            for (kernel, usage) in &usages {
                wrong.extend(
                    excess(kernel, usage, bounds.get(&**kernel).copied()).map(|e| format!("{place} {kernel}: {e}")),
                );
                most = most.max(usage.registers);
                if let Some(code) = &code {
                    let operations = code.get(kernel).map_or(&[][..], Vec::as_slice);
                    wrong.extend(faults(module, operations).map(|e| format!("{place} {kernel}: {e}")));
                }
            }
            // The images built in are machine code, which nobody reads: that they come from the sources is shown by making
            // them again. Images of other sources are the matter of another test.
            if version == prebuilt::NVRTC && prebuilt::image_of(module, "sm_90a").is_some() {
                for (name, made) in [(arch, &compiled.cubin), ("ptx", &compiled.ptx)] {
                    let differs = prebuilt::image_of(module, name).is_some_and(|image| image != *made);
                    if differs && (name != "ptx" || arch == "sm_80") {
                        wrong.push(format!("{place}: the {name} built in is another; {}", prebuilt::REMEDY));
                    }
                }
            }
            if usages.is_empty() {
                wrong.push(format!("{place}: no kernels"));
            }
            let size = compiled.cubin.len();
            (format!("{place}: {} kernels, at most {most} registers, {size} bytes", usages.len()), wrong)
        })
        .collect();
    println!("NVRTC {}.{}", version.0, version.1);
    checked.iter().for_each(|(line, _)| println!("{line}"));
    let wrong: Vec<_> = checked.into_iter().flat_map(|(_, wrong)| wrong).collect();
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}

/// What is not in the table is not checked.
#[test]
fn gate_every_source_is_in_the_table_of_modules() {
    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for path in fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()) {
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|e| e == "cu" || e == "cuh") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    let texts: Vec<_> = modules::ALL.iter().map(|m| m.text()).collect();
    found.retain(|path| {
        let source = fs::read_to_string(path).unwrap();
        !texts.iter().any(|text| text.contains(&source))
    });
    assert!(found.is_empty(), "no module in cuda/modules.rs has {found:?}");
    // The cache and the images built in know modules by their names.
    let names: BTreeSet<_> = modules::ALL.iter().map(|m| m.name).collect();
    assert_eq!(names.len(), modules::ALL.len(), "a name stands twice in the table");
}

#[test]
fn gate_reads_the_assembler_s_report() {
    let log = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'a' for 'sm_80'\n\
        ptxas info    : Function properties for a\n    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
        ptxas info    : Used 40 registers, used 1 barriers, 400 bytes cmem[0]\n\
        ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
        ptxas info    : Function properties for b\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 72 registers, 400 bytes cmem[0]\n\
        a.cu(3): warning #177-D: variable \"x\" was declared but never referenced\n\
        Remark: The warnings can be suppressed with \"-diag-suppress <warning-number>\"\n\
        a.cu(4): warning #186-D: pointless comparison of unsigned integer with zero\n\
        ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n";
    let usages = usages(log);
    assert_eq!(usages["a"], Usage { registers: 40, local: [16, 8, 4] });
    assert_eq!(usages["b"], Usage { registers: 72, local: [0; 3] });
    assert_eq!(warnings(log).count(), 2);
    let ptx = ".visible .entry a(\n.param .u64 p\n)\n.maxntid 128, 1, 1\n.minnctapersm 4\n{\nret;\n}\n\
        .visible .entry b()\n.maxntid 256\n{\n}\n.visible .entry c()\n{\n}\n";
    assert_eq!(bounds(ptx), BTreeMap::from([("a", 128), ("b", 256)]));
    assert!(excess("a", &usages["a"], Some(128)).unwrap().contains("16 bytes of stack"));
    assert!(excess("b", &usages["b"], Some(256)).unwrap().contains("72 registers; 1024 threads"));
    assert_eq!(excess("b", &Usage { registers: 64, local: [0; 3] }, Some(256)), None);
    assert!(excess("b", &Usage::default(), None).is_some());
}

#[test]
fn gate_reads_the_disassembly() {
    let sass = ".text.a:\n.L_x:\n        /*0000*/                   LDC R1, c[0x0][0x28] ;\n\
        /*0010*/              @!P0 STL.64 [R1], R2 ;\n.text.b:\n        /*0000*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ ;\n";
    let kernels = instructions(sass);
    assert_eq!(kernels["a"], ["LDC", "STL.64"]);
    let module = |arch| Module::new("m", "", arch);
    assert!(faults(&module(Arch::Any), &kernels["a"]).unwrap().contains("1 accesses"));
    assert_eq!(faults(&module(Arch::Any), &kernels["b"]), None);
    assert_eq!(faults(&module(Arch::Sm90a), &kernels["b"]), None);
    assert_eq!(faults(&module(Arch::Sm90a), &kernels["a"][..1]).unwrap(), "no HGMMA");
    assert!(faults(&module(Arch::Any), &[]).is_some());
}
