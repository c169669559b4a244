//! A store without an engine: `store ROOT load FILE`, `save NAME FILE`, `import FILE NAME`, `apply FILE DIR`, `list`.
//! `BRIG_STORAGE` names the form of its layers.

use std::error::Error;
use std::fs::File;
use std::io::{BufReader, Write as _};
use std::path::Path;
use std::time::Instant;

use brigantine_image::archive::{self, Import};
use brigantine_image::{Algorithm, Store, layer};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut out = std::io::stdout();
    let start = Instant::now();
    let storage = std::env::var("BRIG_STORAGE").ok().map(|name| name.parse()).transpose()?;
    let open = |root: &str| Store::open_with(Path::new(root), storage);
    match args[..] {
        [root, "load", file] => {
            let store = open(root)?;
            for loaded in
                archive::load(&store, BufReader::with_capacity(1 << 18, File::open(file)?), &mut |_| {})?
            {
                writeln!(out, "{}", loaded.message())?;
            }
        }
        [root, "save", name, file] => {
            let store = open(root)?;
            archive::save(&store, &[name.to_owned()], File::create(file)?)?;
        }
        [root, "import", file, name] => {
            let store = open(root)?;
            let import = Import { reference: Some(name.parse()?), ..Import::default() };
            writeln!(out, "{}", archive::import(&store, File::open(file)?, &import)?.id)?;
        }
        [_, "apply", file, dir] => {
            let applied = layer::apply(File::open(file)?, Path::new(dir), Algorithm::Sha256)?;
            writeln!(out, "{applied:?}")?;
        }
        [root, "list"] => {
            for image in open(root)?.list()? {
                writeln!(out, "{} {:?} {:?} {}", image.id.short(), image.tags, image.digests, image.size)?;
            }
        }
        _ => return Err("store ROOT load FILE|save NAME FILE|import FILE NAME|apply FILE DIR|list".into()),
    }
    writeln!(out, "{:.3} s", start.elapsed().as_secs_f64())?;
    Ok(())
}
