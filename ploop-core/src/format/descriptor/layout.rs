//! Changing how the disk of a descriptor lies in its files: what a conversion does.

use crate::error::{Error, ErrorKind, Result};
use crate::units::Sectors;

use super::{DiskDescriptor, Guid, ImageKind, Mode, cluster_sectors, file_name};

impl DiskDescriptor {
    /// Says how the disk lies in its images from now on, and in clusters of what size. As the original does, every
    /// image of a raw disk is marked as plain.
    pub fn set_layout(&mut self, mode: Mode, cluster: Sectors) -> Result<()> {
        self.cluster_sectors = cluster_sectors(cluster.0)?;
        self.preallocated = mode == Mode::Preallocated;
        let kind = if mode == Mode::Raw { ImageKind::Plain } else { ImageKind::Image };
        self.images.iter_mut().for_each(|image| image.kind = kind);
        Ok(())
    }

    /// Gives the image `guid` another file. Fails with [`ErrorKind::NoSnapshot`] if there is no such image, with
    /// [`ErrorKind::Descriptor`] if the name may not stand in a descriptor or is another image's.
    pub fn set_file(&mut self, guid: Guid, file: &str) -> Result<()> {
        let file = file_name(file)?.to_owned();
        if self.images.iter().any(|image| image.guid != guid && image.file == file) {
            return Err(Error::new(ErrorKind::Descriptor, format!("the file {file:?} is another image's")));
        }
        match self.images.iter_mut().find(|image| image.guid == guid) {
            Some(image) => {
                image.file = file;
                Ok(())
            }
            None => Err(Error::new(ErrorKind::NoSnapshot, format!("there is no image {guid}"))),
        }
    }
}
