//! `ploop map`: where the bytes of a disk lie, as JSON like that of `qemu-img map`, as a table, or as a picture.

use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use ploop_core::device::control::Connection;
use ploop_core::device::runtime::Runtime;
use ploop_core::error::one_line;
use ploop_core::format::{Chain, DESCRIPTOR_NAME, Guid};
use ploop_core::ops::map::{self, MapExtent, MapHead, MapOptions};
use ploop_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::commands::compact::not_mounted;
use crate::exit::{Failure, Outcome};
use crate::open::{self, Wanted};
use crate::output::{Output, human_bytes};
use crate::snapshots::guid;

/// The verb of the control socket.
pub(crate) const VERB: &str = "map";
/// Extents in one message of a server: some 150 bytes each.
const EXTENTS_PER_MESSAGE: usize = 256;
/// Characters of a picture's line.
const PICTURE_COLUMNS: usize = 64;
/// Lines of each picture.
const PICTURE_LINES: usize = 16;

/// Show where the bytes of a disk lie
#[derive(Debug, clap::Args)]
#[command(
    after_help = "With --json the fields are those of `qemu-img map --output=json`: start and length on the guest's disk, \
                  depth (0 is the top image), present, zero, data, and offset and filename of what is held."
)]
pub(crate) struct Arguments {
    /// The snapshot to map instead of the current state
    #[arg(short = 'u', long = "uuid", value_name = "UUID", value_parser = guid)]
    snapshot: Option<Guid>,

    /// Draw the disk and its top image, one character for each slice
    #[arg(long)]
    picture: bool,

    /// The DiskDescriptor.xml of the disk, its folder or image file; of a running one also its device or mount point
    #[arg(value_name = "DISK", default_value = "DiskDescriptor.xml")]
    disk: PathBuf,
}

/// What a server tells.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Told {
    Head(MapHead),
    Extents(Vec<MapExtent>),
}

/// Maps a running disk, message by message.
pub(crate) fn serve(chain: &Chain, connection: &Connection) -> Result<Value> {
    connection.send(&Told::Head(MapHead { files: Vec::new(), ..map::head(chain)? }), &[])?;
    let mut batch = Vec::with_capacity(EXTENTS_PER_MESSAGE);
    map::extents(chain, &mut |extent| {
        batch.push(extent);
        if batch.len() >= EXTENTS_PER_MESSAGE {
            connection.send(&Told::Extents(std::mem::take(&mut batch)), &[])?;
        }
        Ok(())
    })?;
    if !batch.is_empty() {
        connection.send(&Told::Extents(batch), &[])?;
    }
    Ok(Value::Null)
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Outcome {
    if arguments.picture && output.is_json() {
        return Err(
            Error::new(ErrorKind::Parameter, "a picture is for people: --picture without --json").into()
        );
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let mut shown = Shown::new(arguments.picture, output.is_json(), &mut out);
    let result = look(arguments, &mut shown);
    match (result, shown.broken.take()) {
        // The reader has seen enough.
        (_, Some(cause)) if cause.kind() == io::ErrorKind::BrokenPipe => Err(Failure::OutputClosed),
        (_, Some(cause)) => Err(Error::io(ErrorKind::Write, "print on stdout", cause).into()),
        (result, None) => Ok(result?),
    }
}

fn look(arguments: &Arguments, shown: &mut Shown<'_>) -> Result<()> {
    let runtime = Runtime::of_user()?;
    let running = match arguments.snapshot {
        // Its images are not written to, whoever has the disk.
        Some(_) => None,
        None => runtime.find(&arguments.disk)?,
    };
    if let Some(state) = running {
        let files: Vec<String> =
            state.images.iter().rev().map(|image| image.path.display().to_string()).collect();
        let connection = crate::serving::connect(&runtime.entry(&state.id))?;
        let mut failed = None;
        let told = |message: Value| {
            let Ok(told) = serde_json::from_value::<Told>(message) else { return };
            let result = match told {
                Told::Head(head) => shown.begin(&MapHead { files: files.clone(), ..head }),
                Told::Extents(extents) => extents.into_iter().try_for_each(|extent| {
                    let filename = extent.offset.and_then(|_| files.get(extent.depth as usize).cloned());
                    shown.extent(&MapExtent { filename, ..extent })
                }),
            };
            if let Err(error) = result {
                failed.get_or_insert(error);
            }
        };
        let answer = connection.ask(VERB, &(), &[], None, told);
        if let Some(error) = failed {
            return Err(error);
        }
        answer?;
        return shown.end();
    }
    let kind = open::look_at(&arguments.disk)?;
    if kind.file_type().is_block_device() || (kind.is_dir() && !arguments.disk.join(DESCRIPTOR_NAME).exists())
    {
        return Err(not_mounted(&arguments.disk));
    }
    let disks = vec![arguments.disk.clone()];
    let request = open::resolve(&Wanted { disks, read_only: true, ..Wanted::default() })?;
    let path = request.descriptor.or_else(|| request.images.into_iter().next()).unwrap_or_default();
    let options = MapOptions { path, snapshot: arguments.snapshot };
    let shown = std::cell::RefCell::new(shown);
    map::map(&options, &mut |head| shown.borrow_mut().begin(head), &mut |extent| {
        shown.borrow_mut().extent(&extent)
    })?;
    shown.into_inner().end()
}

/// How a map is shown, extent by extent.
struct Shown<'a> {
    out: &'a mut dyn Write,
    form: Form,
    is_first: bool,
    broken: Option<io::Error>,
}

enum Form {
    Json,
    Table,
    Picture(Option<Box<Picture>>),
}

impl<'a> Shown<'a> {
    fn new(picture: bool, json: bool, out: &'a mut dyn Write) -> Self {
        let form = match (picture, json) {
            (true, _) => Form::Picture(None),
            (false, true) => Form::Json,
            (false, false) => Form::Table,
        };
        Self { out, form, is_first: true, broken: None }
    }

    /// Remembers why printing failed; the map ends there.
    fn printed(&mut self, result: io::Result<()>) -> Result<()> {
        result.map_err(|cause| {
            self.broken = Some(cause);
            Error::new(ErrorKind::Cancelled, "nobody reads the map any more")
        })
    }

    fn begin(&mut self, head: &MapHead) -> Result<()> {
        let result = match &mut self.form {
            Form::Json => write!(self.out, "["),
            Form::Table => writeln!(self.out, "{:>18} {:>18} {:>18}  file", "start", "length", "offset"),
            Form::Picture(picture) => {
                *picture = Some(Box::new(Picture::new(head)));
                Ok(())
            }
        };
        self.printed(result)
    }

    fn extent(&mut self, extent: &MapExtent) -> Result<()> {
        let is_first = std::mem::replace(&mut self.is_first, false);
        let result = match &mut self.form {
            Form::Json => serde_json::to_string(extent)
                .map_err(io::Error::from)
                .and_then(|text| write!(self.out, "{}{text}", if is_first { "" } else { ",\n" })),
            Form::Table => match (&extent.filename, extent.offset) {
                (Some(file), Some(offset)) => {
                    let hole = if extent.data { "" } else { " (hole)" };
                    let file = one_line(file);
                    writeln!(
                        self.out,
                        "{:>18} {:>18} {offset:>18}  {file}{hole}",
                        extent.start, extent.length
                    )
                }
                _ => writeln!(self.out, "{:>18} {:>18} {:>18}  zeros", extent.start, extent.length, "-"),
            },
            Form::Picture(picture) => {
                if let Some(picture) = picture {
                    picture.add(extent);
                }
                Ok(())
            }
        };
        self.printed(result)
    }

    fn end(&mut self) -> Result<()> {
        let result = match &self.form {
            Form::Json => writeln!(self.out, "]"),
            Form::Table => Ok(()),
            Form::Picture(None) => Ok(()),
            Form::Picture(Some(picture)) => picture.write(self.out),
        };
        let result = result.and_then(|()| self.out.flush());
        self.printed(result)
    }
}

/// Counts for each slice how many of its bytes are what.
struct Picture {
    head: MapHead,
    disk: Slices,
    file: Slices,
}

/// A range cut into as many equal slices as a picture has characters.
struct Slices {
    total: u64,
    /// Bytes of a slice; at least 1.
    bytes: u64,
    /// Bytes of each kind in each slice: those of the top (or in use), and those of deltas below.
    filled: Vec<(u64, u64)>,
}

impl Slices {
    fn new(total: u64, unit: u64) -> Self {
        let most = (PICTURE_COLUMNS * PICTURE_LINES) as u64;
        // Whole clusters, so that a picture of a small disk has a character for each.
        let bytes = total.div_ceil(most).max(1).next_multiple_of(unit.max(1));
        let count = usize::try_from(total.div_ceil(bytes)).unwrap_or(0);
        Self { total, bytes, filled: vec![(0, 0); count] }
    }

    fn add(&mut self, start: u64, length: u64, is_below: bool) {
        let (mut at, end) = (start, start.saturating_add(length).min(self.total));
        while at < end {
            let slice = at / self.bytes;
            let stop = (slice + 1).saturating_mul(self.bytes).min(end);
            if let Some(filled) = usize::try_from(slice).ok().and_then(|slice| self.filled.get_mut(slice)) {
                let kind = if is_below { &mut filled.1 } else { &mut filled.0 };
                *kind = kind.saturating_add(stop - at);
            }
            at = stop;
        }
    }

    fn write(
        &self,
        out: &mut dyn Write,
        character: impl Fn(usize, u64, (u64, u64)) -> char,
    ) -> io::Result<()> {
        for (line, slices) in self.filled.chunks(PICTURE_COLUMNS).enumerate() {
            let text: String = slices
                .iter()
                .enumerate()
                .map(|(column, &filled)| {
                    let number = line * PICTURE_COLUMNS + column;
                    let start = number as u64 * self.bytes;
                    character(number, self.bytes.min(self.total.saturating_sub(start)), filled)
                })
                .collect();
            writeln!(out, "  {text}")?;
        }
        Ok(())
    }
}

impl Picture {
    fn new(head: &MapHead) -> Self {
        let disk = Slices::new(head.disk_bytes, head.cluster_bytes);
        let file = Slices::new(head.file_bytes, head.cluster_bytes);
        Self { head: head.clone(), disk, file }
    }

    fn add(&mut self, extent: &MapExtent) {
        if extent.data {
            self.disk.add(extent.start, extent.length, extent.depth > 0);
        }
        if let (0, Some(offset)) = (extent.depth, extent.offset) {
            // The last cluster of a disk may be cut short; its place in the file is whole.
            self.file.add(offset, extent.length, false);
        }
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let slice = |slices: &Slices| human_bytes(slices.bytes);
        writeln!(
            out,
            "disk: {}, {} for each character",
            human_bytes(self.head.disk_bytes),
            slice(&self.disk)
        )?;
        self.disk.write(out, |_, bytes, (top, below)| match top.saturating_add(below) {
            0 => '.',
            _ if top == 0 => '+',
            sum if sum.saturating_mul(2) < bytes => 'o',
            _ => '#',
        })?;
        writeln!(out, "  # in the top   o less than half   + only in a lower delta   . zeros")?;
        let name = self.head.files.first().map_or_else(|| "top".to_owned(), |name| one_line(name));
        writeln!(
            out,
            "file: {name}, {}, {} for each character",
            human_bytes(self.head.file_bytes),
            slice(&self.file)
        )?;
        let table_end = self.head.data_start;
        self.file.write(out, |number, bytes, (used, _)| {
            let start = number as u64 * self.file.bytes;
            match used {
                0 if start < table_end => 't',
                0 => '.',
                used if used.saturating_mul(2) < bytes => 'o',
                _ => '#',
            }
        })?;
        writeln!(out, "  # used   o less than half   t header and table   . free or lost")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, length: u64, depth: u32, offset: Option<u64>) -> MapExtent {
        MapExtent {
            start,
            length,
            depth,
            present: offset.is_some(),
            zero: offset.is_none(),
            data: offset.is_some(),
            compressed: false,
            offset,
            filename: None,
        }
    }

    #[test]
    fn a_picture_has_a_character_for_each_slice() {
        let head = MapHead {
            disk_bytes: 4 << 20,
            cluster_bytes: 1 << 20,
            files: vec!["root.hds".into()],
            file_bytes: 4 << 20,
            data_start: 1 << 20,
        };
        let mut picture = Picture::new(&head);
        picture.add(&extent(0, 1 << 20, 0, Some(3 << 20)));
        picture.add(&extent(1 << 20, 1 << 20, 1, Some(1 << 20)));
        picture.add(&extent(2 << 20, 2 << 20, 1, None));
        let mut text = Vec::new();
        picture.write(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("\n  #+..\n") && text.contains("\n  t..#\n"), "{text}");
        // Any size fits the terminal.
        let mut large = Picture::new(&MapHead { disk_bytes: 16 << 40, file_bytes: 1 << 40, ..head });
        large.add(&extent(0, 16 << 40, 0, Some(0)));
        let mut text = Vec::new();
        large.write(&mut text).unwrap();
        let lines = String::from_utf8(text).unwrap();
        assert!(lines.lines().all(|line| line.len() < 90) && lines.lines().count() < 40, "{lines}");
    }
}
