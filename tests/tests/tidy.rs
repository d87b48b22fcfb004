//! What the compiler and its lints do not check: the shape of the tree and of its files.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail the test"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use syn::Item;

/// Lines of production code in one file.
const MAX_FILE_LINES: usize = 500;
/// Characters in a line.
const MAX_LINE_CHARS: usize = 100;
/// Characters in a commit's title.
const MAX_TITLE_CHARS: usize = 72;
/// What may stand at the top of the tree, beside dotfiles and what cargo writes.
const TOP_LEVEL: [&str; 8] = [
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "backend",
    "blockdev",
    "ci",
    "iter",
];
/// The crates whose files are checked.
const CRATES: [&str; 4] = ["backend", "blockdev", "iter", "tests"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Every tracked file, relative to the root.
fn tracked() -> Vec<PathBuf> {
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(listed.status.success(), "git ls-files failed");
    let listed = String::from_utf8(listed.stdout).unwrap();
    listed
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        .collect()
}

fn rust_files() -> Vec<PathBuf> {
    let is_rust = |path: &PathBuf| path.extension().is_some_and(|e| e == "rs");
    let files: Vec<_> = tracked().into_iter().filter(is_rust).collect();
    assert!(
        files.len() > 50,
        "only {} Rust files are tracked",
        files.len()
    );
    files
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn is_test_file(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests")
        || path
            .file_stem()
            .is_some_and(|stem| stem == "tests" || stem == "testing")
}

/// The part of a file that is compiled into the product: all above its inline test modules.
fn production(text: &str) -> &str {
    text.find("#[cfg(test)]\nmod tests {")
        .map_or(text, |at| &text[..at])
}

fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn nothing_unexpected_stands_at_the_top() {
    let names: BTreeSet<_> = tracked()
        .iter()
        .filter_map(|path| path.components().next())
        .map(|first| first.as_os_str().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && name != "tests")
        .collect();
    assert_eq!(names, TOP_LEVEL.map(String::from).into_iter().collect());
}

#[test]
fn files_are_short() {
    let mut long = Vec::new();
    for path in rust_files() {
        let text = read(&path);
        let lines = production(&text).lines().count();
        if !is_test_file(&path) && lines > MAX_FILE_LINES {
            long.push(format!("{}: {lines}", path.display()));
        }
    }
    assert_none("files with too many lines", &long);
}

#[test]
fn lines_are_short_and_clean() {
    let mut wrong = Vec::new();
    for path in rust_files() {
        for (number, line) in read(&path).lines().enumerate() {
            let at = format!("{}:{}", path.display(), number + 1);
            if line.chars().count() > MAX_LINE_CHARS {
                wrong.push(format!("{at}: too long"));
            }
            if line.ends_with(' ') || line.contains('\t') {
                wrong.push(format!("{at}: stray white space"));
            }
        }
    }
    assert_none("lines", &wrong);
}

#[test]
fn every_rule_is_guarded_by_a_test_that_exists() {
    let table = read(Path::new("tests/README.md"));
    let rows = table.lines().filter(|line| line.starts_with("| "));
    let guards: BTreeSet<&str> = rows
        .filter_map(|row| row.rsplit("| ").next())
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    assert!(guards.len() > 50, "the table is read: {}", guards.len());
    let sources: String = rust_files().iter().map(|path| read(path)).collect();
    let is_missing = |guard: &&&str| !sources.contains(&format!("fn {guard}("));
    let missing: Vec<String> = guards
        .iter()
        .filter(is_missing)
        .map(|g| (*g).into())
        .collect();
    assert_none("tests that are not there", &missing);
}

#[test]
fn nothing_is_left_unfinished() {
    // Put together here, so that this file does not find itself.
    let marks = [
        ["FIX", "ME"],
        ["XX", "X"],
        ["TO", "DO"],
        ["#[ign", "ore"],
        ["unimpl", "emented!"],
    ];
    let mut found = Vec::new();
    for path in rust_files() {
        for (number, line) in read(&path).lines().enumerate() {
            if marks.iter().any(|mark| line.contains(&mark.concat())) {
                found.push(format!(
                    "{}:{}: {}",
                    path.display(),
                    number + 1,
                    line.trim()
                ));
            }
        }
    }
    assert_none("unfinished", &found);
}

#[test]
fn the_two_ends_have_their_names() {
    let banned = [["sla", "ve"], ["mas", "ter"]].map(|word| word.concat());
    let mut found = Vec::new();
    for path in rust_files() {
        for (number, line) in read(&path).lines().enumerate() {
            let line = line.to_ascii_lowercase();
            let mut words = line.split(|c: char| !c.is_ascii_alphabetic());
            if words.any(|word| banned.iter().any(|banned| word == banned)) {
                found.push(format!("{}:{}", path.display(), number + 1));
            }
        }
    }
    assert_none("say front end and back end", &found);
}

/// Adds the files of the modules that `file` declares, and theirs.
fn modules(file: &Path, found: &mut BTreeSet<PathBuf>) {
    found.insert(file.to_owned());
    let text = read(file);
    let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let stem = file.file_stem().unwrap();
    let folder = match stem.to_str() {
        Some("lib" | "main" | "mod") => file.parent().unwrap().to_owned(),
        _ if file
            .parent()
            .is_some_and(|p| p.ends_with("bin") || p.ends_with("tests")) =>
        {
            file.parent().unwrap().to_owned()
        }
        _ => file.with_extension(""),
    };
    declared(&parsed.items, &folder, found);
}

fn declared(items: &[Item], folder: &Path, found: &mut BTreeSet<PathBuf>) {
    for item in items {
        let Item::Mod(module) = item else { continue };
        let name = module.ident.to_string();
        match &module.content {
            Some((_, items)) => declared(items, &folder.join(name), found),
            None => {
                let flat = folder.join(format!("{name}.rs"));
                let deep = folder.join(&name).join("mod.rs");
                let file = if root().join(&flat).exists() {
                    flat
                } else {
                    deep
                };
                modules(&file, found);
            }
        }
    }
}

#[test]
fn every_file_is_part_of_a_module() {
    let files: BTreeSet<_> = rust_files().into_iter().collect();
    let mut reached = BTreeSet::new();
    for name in CRATES {
        for start in ["src/lib.rs", "src/main.rs"] {
            let start = Path::new(name).join(start);
            if files.contains(&start) {
                modules(&start, &mut reached);
            }
        }
    }
    let is_source = |path: &&PathBuf| {
        CRATES
            .iter()
            .any(|name| path.starts_with(Path::new(name).join("src")))
            && !path.parent().is_some_and(|parent| parent.ends_with("bin"))
    };
    let orphans: Vec<_> = files
        .iter()
        .filter(is_source)
        .filter(|path| !reached.contains(*path))
        .map(|path| path.display().to_string())
        .collect();
    assert_none("files that no module declares", &orphans);
}

#[test]
fn unsafe_code_stands_in_files_that_give_a_reason() {
    let mut found = Vec::new();
    for path in rust_files() {
        let text = read(&path);
        let uses = text.lines().map(str::trim_start).any(|line| {
            !line.starts_with("//")
                && ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern"]
                    .iter()
                    .any(|form| line.contains(form))
        });
        let opts_in =
            text.contains("#![expect(unsafe_code") || text.contains("#![expect(\n    unsafe_code");
        if uses && !opts_in && path.file_name().is_none_or(|name| name != "tidy.rs") {
            found.push(path.display().to_string());
        }
    }
    assert_none(
        "unsafe code without a reason at the top of its file",
        &found,
    );
}

#[test]
fn every_device_passes_the_conformance_suite() {
    let suite = read(Path::new("blockdev/tests/conformance.rs"));
    for device in ["file", "memory", "null", "fault"] {
        let line = format!("conformance!({device}");
        let named = suite.lines().any(|l| l.trim_start().starts_with(&line));
        assert!(
            named,
            "no line for {device} in blockdev/tests/conformance.rs"
        );
    }
}

#[test]
fn commits_say_what_and_why() {
    let log = Command::new("git")
        .args(["log", "--no-merges", "--format=%h%x00%s%x00%b%x01"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(log.status.success(), "git log failed");
    let mut wrong = Vec::new();
    let log = String::from_utf8(log.stdout).unwrap();
    for commit in log
        .split('\u{1}')
        .map(str::trim)
        .filter(|commit| !commit.is_empty())
    {
        let parts: Vec<&str> = commit.split('\0').collect();
        let [hash, title, body] = parts[..] else {
            panic!("git log: {commit}")
        };
        if title.chars().count() > MAX_TITLE_CHARS || !title.contains(": ") {
            wrong.push(format!("{hash}: {title}"));
        }
        if body.trim().is_empty() {
            wrong.push(format!("{hash}: no body"));
        }
    }
    assert_none("commits", &wrong);
}
