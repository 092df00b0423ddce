//! The files of one migration, opened.

use crate::failure::{Error, Failure};
use crate::open::{Container, Opened, open};
use crate::source::Source;
use qevm_wire::PageGeometry;
use std::path::{Path, PathBuf};

/// A named input.
#[derive(Debug)]
pub struct Named {
    /// As the user wrote it; `-` is shown as `standard input`.
    pub name: String,
    /// Its bytes.
    pub source: Source,
}

/// Which files a migration is in.
///
/// ```
/// use qevm_inspect::stream::Input;
/// let input = Input { channels: vec!["channel-0".into()], ..Input::plain("main".as_ref()) };
/// assert_eq!((input.offset, input.snapshot), (0, None));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Input {
    /// The main channel; `-` for standard input, which can only be one of the files.
    pub main: PathBuf,
    /// The stream starts at this byte of `main`, or of what a compressed file or a snapshot holds.
    pub offset: u64,
    /// Name or ID of the internal snapshot, if `main` is a qcow2 image that has several.
    pub snapshot: Option<String>,
    /// Size of a target page, where neither the configuration nor a description tells it.
    pub pages: Option<PageGeometry>,
    /// multifd and preempt channels, in any order.
    pub channels: Vec<PathBuf>,
    /// Main channels of resumed postcopy, in order.
    pub recovery: Vec<PathBuf>,
    /// Return paths: of the main channel, then of the recoveries.
    pub return_path: Vec<PathBuf>,
}

impl Input {
    /// A single file, with nothing said about it.
    pub fn plain(main: &Path) -> Self {
        Input { main: main.to_owned(), ..Input::default() }
    }

    /// As [`plain`](Input::plain), of the `snapshot` if the file is a qcow2 image.
    pub fn snapshot_of(main: &Path, snapshot: Option<&str>) -> Self {
        Input { snapshot: snapshot.map(str::to_owned), ..Input::plain(main) }
    }
}

/// The files of one migration.
#[derive(Debug)]
pub struct Inputs {
    /// The main channel.
    pub main: Named,
    /// Where the stream starts in the main channel's file.
    pub offset: u64,
    /// What the main channel is wrapped in, outermost first.
    pub containers: Vec<Container>,
    /// Target page size, if the caller knows it.
    pub pages: Option<PageGeometry>,
    /// multifd and preempt channels, in any order.
    pub channels: Vec<Named>,
    /// Main channels of resumed postcopy, in order.
    pub recovery: Vec<Named>,
    /// Return paths: of the main channel, then of the recoveries.
    pub return_path: Vec<Named>,
}

impl Inputs {
    /// Opens all files.
    ///
    /// # Errors
    /// [`Error::Usage`] if a file cannot be opened.
    pub fn open(input: &Input) -> Result<Self, Error> {
        let stdin = std::iter::once(&input.main)
            .chain(&input.channels)
            .chain(&input.recovery)
            .chain(&input.return_path)
            .filter(|path| path.as_os_str() == "-");
        if stdin.count() > 1 {
            return Err(Error::Usage("standard input (-) can only be one of the files".into()));
        }
        let all = |paths: &[PathBuf]| paths.iter().map(|path| named(path)).collect::<Result<Vec<_>, _>>();
        let opened = open(&input.main, input.snapshot.as_deref(), input.offset > 0)?;
        let Opened { name, source, offset, containers } = opened;
        Ok(Inputs {
            containers,
            main: Named { name, source },
            // Who says where it starts counts from the first byte, whatever lies before it.
            offset: if input.offset > 0 { input.offset } else { offset },
            pages: input.pages,
            channels: all(&input.channels)?,
            recovery: all(&input.recovery)?,
            return_path: all(&input.return_path)?,
        })
    }

    /// One file alone, whatever container its stream is in.
    ///
    /// # Errors
    /// As [`open`].
    pub fn of_file(path: &Path) -> Result<Self, Error> {
        let Opened { name, source, offset, containers } = open(path, None, false)?;
        Ok(Inputs { offset, containers, ..Inputs::single(&name, source) })
    }

    /// One main channel alone.
    pub fn single(name: &str, source: Source) -> Self {
        Inputs {
            main: Named { name: name.to_owned(), source },
            offset: 0,
            containers: Vec::new(),
            pages: None,
            channels: Vec::new(),
            recovery: Vec::new(),
            return_path: Vec::new(),
        }
    }

    /// True if everything can be read a second time.
    pub fn is_seekable(&self) -> bool {
        self.all().all(|named| named.source.is_seekable())
    }

    /// Length of all files together, as far as it is known.
    pub fn total(&self) -> Option<u64> {
        self.all().map(|named| named.source.total()).sum()
    }

    /// Goes back to the start of every file.
    pub(super) fn rewind(&mut self) -> Result<(), Failure> {
        let files = [&mut self.channels, &mut self.recovery, &mut self.return_path].into_iter().flatten();
        for named in std::iter::once(&mut self.main).chain(files) {
            named.source.jump(0).map_err(|error| Failure::io(&named.name, 0, &error))?;
        }
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &Named> {
        std::iter::once(&self.main).chain(&self.channels).chain(&self.recovery).chain(&self.return_path)
    }
}

fn named(path: &Path) -> Result<Named, Error> {
    let Opened { name, source, .. } = open(path, None, false)?;
    Ok(Named { name, source })
}
