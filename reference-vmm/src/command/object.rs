//! `--object`: memory backends and iommufds in QEMU's words.

use super::options::Options;
use super::qmp_object;
use anyhow::{Context, bail, ensure};
use qevm_migration::parse_size;
use reference_vmm::descriptors::Descriptors;
use reference_vmm::memory::{BackendError, BackendKind, MemoryBackend};
use reference_vmm::vfio::Iommufd;

/// An object of the command line.
enum Object {
    Memory(MemoryBackend),
    /// With the descriptor that it names.
    Iommufd {
        id: String,
        fd: Option<String>,
    },
}

impl Object {
    fn id(&self) -> &str {
        match self {
            Object::Memory(backend) => &backend.id,
            Object::Iommufd { id, .. } => id,
        }
    }
}

/// All of them; none of two has the same id.
///
/// # Errors
/// The texts are those of QEMU 11.1, with the argument before them.
fn objects(texts: &[String]) -> anyhow::Result<Vec<Object>> {
    let mut objects: Vec<Object> = Vec::new();
    for text in texts.iter().filter(|text| !qmp_object::is_one(text)) {
        let object = object(text).with_context(|| format!("--object {text}"))?;
        let duplicate = objects.iter().any(|other| other.id() == object.id());
        ensure!(!duplicate, "--object {text}: Duplicate ID '{}' for object", object.id());
        objects.push(object);
    }
    Ok(objects)
}

/// What `-M memory-backend=` finds.
///
/// # Errors
/// The texts are those of QEMU 11.1, with the argument before them.
pub(crate) fn memory_backends(texts: &[String]) -> anyhow::Result<Vec<MemoryBackend>> {
    let memory = |object| match object {
        Object::Memory(backend) => Some(backend),
        Object::Iommufd { .. } => None,
    };
    Ok(objects(texts)?.into_iter().filter_map(memory).collect())
}

/// What `-device vfio-pci,iommufd=` finds. Their descriptors are taken.
///
/// # Errors
/// As above; a descriptor that there is not.
pub(crate) fn iommufds(texts: &[String], descriptors: &mut Descriptors) -> anyhow::Result<Vec<Iommufd>> {
    let mut iommufds = Vec::new();
    for object in objects(texts)? {
        if let Object::Iommufd { id, fd } = object {
            let taken = fd.map(|fd| descriptors.take(&fd)).transpose();
            let fd = taken.with_context(|| format!("--object iommufd,id={id}: Could not parse remote object fd"))?;
            iommufds.push(Iommufd { id, fd });
        }
    }
    Ok(iommufds)
}

/// The backend of this id among them, and the bytes of RAM of its machine: what `memory` says, or as many as it has.
///
/// # Errors
/// As above.
pub(crate) fn chosen(texts: &[String], id: &str, memory: Option<u64>) -> anyhow::Result<(MemoryBackend, u64)> {
    let backends = memory_backends(texts)?;
    let found = backends.into_iter().find(|backend| backend.id == id);
    let backend = found.with_context(|| format!("Memory backend '{id}' not found"))?;
    match memory {
        Some(memory) if memory != backend.size => bail!(BackendError::Size),
        memory => Ok((backend.clone(), memory.unwrap_or(backend.len()))),
    }
}

const IOMMUFD: &str = "iommufd";

fn object(text: &str) -> anyhow::Result<Object> {
    let mut options = Options::parse(text, "qom-type")?;
    let qom_type = options.take("qom-type").context("Parameter 'qom-type' is missing")?;
    let kinds = ["memory-backend-ram", "memory-backend-memfd", "memory-backend-file", IOMMUFD];
    ensure!(kinds.contains(&qom_type.as_str()), "Parameter 'qom-type' does not accept value '{qom_type}'");
    let id = options.take("id").context("Parameter 'id' is missing")?;
    let well_formed = id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.chars().all(|char| char.is_ascii_alphanumeric() || "-._".contains(char));
    ensure!(well_formed, "Parameter 'id' expects an identifier");
    if qom_type == IOMMUFD {
        let fd = options.take("fd");
        return match options.unused().next() {
            Some(name) => bail!("Invalid parameter '{name}'"),
            None => Ok(Object::Iommufd { id, fd }),
        };
    }
    Ok(Object::Memory(memory_backend(&qom_type, id, options)?))
}

fn memory_backend(qom_type: &str, id: String, mut options: Options) -> anyhow::Result<MemoryBackend> {
    let size = size(&mut options, "size")?.context("Parameter 'size' is missing")?;
    ensure!(size > 0, "property 'size' of {qom_type} doesn't take value '0'");
    let kind = match qom_type {
        "memory-backend-ram" => BackendKind::Ram,
        "memory-backend-memfd" => {
            let page_size = self::size(&mut options, "hugetlbsize")?;
            ensure!(page_size != Some(0), "Property 'memory-backend-memfd.hugetlbsize' doesn't take value '0'");
            let hugetlb = switch(&mut options, "hugetlb", false)?.then_some(page_size.unwrap_or(0));
            BackendKind::Memfd { hugetlb, seal: switch(&mut options, "seal", true)? }
        }
        _ => BackendKind::File {
            path: options.take("mem-path").context("Parameter 'mem-path' is missing")?.into(),
            offset: self::size(&mut options, "offset")?.unwrap_or(0),
        },
    };
    // QEMU's default differs by type.
    let share = switch(&mut options, "share", matches!(kind, BackendKind::Memfd { .. }))?;
    let backend = MemoryBackend {
        id,
        size,
        kind,
        share,
        prealloc: switch(&mut options, "prealloc", false)?,
        reserve: switch(&mut options, "reserve", true)?,
        merge: switch(&mut options, "merge", false)?,
        canonical_path: switch(&mut options, "x-use-canonical-path-for-ramblock-id", false)?,
    };
    ensure!(!switch(&mut options, "dump", false)?, "dump=on is not supported here: guest memory is kept out of dumps");
    match options.unused().next() {
        Some(name) if UNSUPPORTED.contains(&name) => bail!("property '{name}' is not supported here"),
        Some(name) => bail!("Invalid parameter '{name}'"),
        None => Ok(backend),
    }
}

/// Properties of QEMU's that these memory backends do not have.
const UNSUPPORTED: &[&str] = &[
    "align",
    "discard-data",
    "host-nodes",
    "pmem",
    "policy",
    "prealloc-context",
    "prealloc-threads",
    "readonly",
    "rom",
];

fn switch(options: &mut Options, name: &str, otherwise: bool) -> anyhow::Result<bool> {
    Ok(options.switch(name)?.unwrap_or(otherwise))
}

/// Unlike with `--memory`, a plain number is bytes.
fn size(options: &mut Options, name: &str) -> anyhow::Result<Option<u64>> {
    let Some(text) = options.take(name) else { return Ok(None) };
    let bytes = parse_size(&text, 1).ok().with_context(|| format!("Parameter '{name}' expects a size value"))?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(text: &str) -> MemoryBackend {
        memory_backends(&[text.to_owned()]).unwrap().pop().unwrap()
    }

    fn refused(texts: &[&str]) -> String {
        let texts: Vec<_> = texts.iter().map(|text| text.to_string()).collect();
        format!("{:#}", memory_backends(&texts).unwrap_err())
    }

    #[test]
    fn backends_are_written_as_for_qemu() {
        let ram = only("memory-backend-ram,id=mem,size=64M,share=on,prealloc=on,reserve=off");
        let expected = MemoryBackend {
            id: "mem".into(),
            size: 64 << 20,
            kind: BackendKind::Ram,
            share: true,
            prealloc: true,
            reserve: false,
            merge: false,
            canonical_path: false,
        };
        assert_eq!(ram, expected);
        // `info memdev` of QEMU 10.0 and 11.1: memfd alone is shared by default.
        let default = |text: &str| only(text);
        assert!(!default("memory-backend-ram,id=m,size=1G").share);
        let memfd = default("qom-type=memory-backend-memfd,id=m,size=67108864");
        assert_eq!((memfd.share, memfd.kind), (true, BackendKind::Memfd { hugetlb: None, seal: true }));
        let huge = default("memory-backend-memfd,id=m,size=1g,hugetlb=on,hugetlbsize=2M,seal=off");
        assert_eq!(huge.kind, BackendKind::Memfd { hugetlb: Some(2 << 20), seal: false });
        let file = default("memory-backend-file,id=m,size=65536k,mem-path=/a,,b,offset=4096,dump=off");
        assert_eq!((file.share, file.size), (false, 64 << 20));
        assert_eq!(file.kind, BackendKind::File { path: "/a,b".into(), offset: 4096 });
    }

    /// The texts are QEMU 11.1's.
    #[test]
    fn what_qemu_refuses_is_refused_in_its_words() {
        for (text, why) in [
            ("memory-backend-ram,id=mem", "Parameter 'size' is missing"),
            ("memory-backend-ram,size=64M", "Parameter 'id' is missing"),
            ("memory-backend-ram,id=1mem,size=64M", "Parameter 'id' expects an identifier"),
            ("memory-backend-ram,id=mem,size=xyz", "Parameter 'size' expects a size value"),
            ("memory-backend-ram,id=mem,size=16E", "Parameter 'size' expects a size value"),
            ("memory-backend-ram,id=mem,size=0", "property 'size' of memory-backend-ram doesn't take value '0'"),
            ("memory-backend-ram,id=mem,size=64M,share=maybe", "Parameter 'share' expects 'on' or 'off'"),
            ("memory-backend-ram,id=mem,size=64M,colour=red", "Invalid parameter 'colour'"),
            ("memory-backend-ram,id=mem,size=64M,hugetlb=on", "Invalid parameter 'hugetlb'"),
            ("memory-backend-file,id=mem,size=64M", "Parameter 'mem-path' is missing"),
            ("memory-backend-nope,id=mem,size=64M", "Parameter 'qom-type' does not accept value 'memory-backend-nope'"),
            (
                "memory-backend-memfd,id=mem,size=64M,hugetlb=on,hugetlbsize=0",
                "Property 'memory-backend-memfd.hugetlbsize' doesn't take value '0'",
            ),
        ] {
            assert_eq!(refused(&[text]), format!("--object {text}: {why}"));
        }
        let one = "memory-backend-ram,id=mem,size=64M";
        assert_eq!(refused(&[one, one]), format!("--object {one}: Duplicate ID 'mem' for object"));
        let ours = "memory-backend-ram,id=mem,size=64M,policy=bind";
        assert_eq!(refused(&[ours]), format!("--object {ours}: property 'policy' is not supported here"));
    }

    #[test]
    fn an_iommufd_is_opened_here_or_given() {
        let texts = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        let all = texts(&["memory-backend-ram,id=mem,size=64M", "iommufd,id=fd0", "qom-type=iommufd,id=fd1,fd=2"]);
        let found = iommufds(&all, &mut Descriptors::default()).unwrap();
        let ids: Vec<_> = found.iter().map(|iommufd| (iommufd.id.as_str(), iommufd.fd.is_some())).collect();
        assert_eq!(ids, [("fd0", false), ("fd1", true)]);
        assert_eq!(memory_backends(&all).unwrap().len(), 1);
        let missing = texts(&["iommufd,id=fd0,fd=77"]);
        let error = format!("{:#}", iommufds(&missing, &mut Descriptors::default()).unwrap_err());
        assert!(error.contains("'77' has not been found"), "{error}");
        assert!(refused(&["iommufd"]).ends_with("Parameter 'id' is missing"));
        assert!(refused(&["iommufd,id=fd0,size=1"]).ends_with("Invalid parameter 'size'"));
        assert!(
            refused(&["iommufd,id=a", "memory-backend-ram,id=a,size=64M"]).ends_with("Duplicate ID 'a' for object")
        );
    }

    #[test]
    fn a_machine_takes_its_backend_and_its_size() {
        let texts = ["memory-backend-ram,id=mem,size=67108865".to_owned()];
        let error = |id, memory| chosen(&texts, id, memory).unwrap_err().to_string();
        assert_eq!(error("nope", None), "Memory backend 'nope' not found");
        let why = "Machine memory size does not match the size of the memory backend";
        assert_eq!(error("mem", Some(64 << 20)), why);
        // `info ramblock` of QEMU 10.0 and 11.1: a page more.
        assert_eq!(chosen(&texts, "mem", None).unwrap().1, 0x4001000);
    }
}
