//! The manifest: the checked text that *is* the store at one version.
//!
//! Two lines: canonical JSON, and 128 bits of BLAKE3 over it in hex. Unknown fields are ignored
//! (a later minor version may add some); duplicate ones are refused.

use std::marker::PhantomData;

use serde::de::{Error, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::checksum;
use crate::dtype::Dtype;
use crate::layout::{Plan, SiteSpec, Size};

/// A manifest is read into memory whole, so a hostile file is refused above this. 10^6 shards of
/// 10^3 sites need a tenth of it.
pub const MAX_BYTES: u64 = 1 << 30;

/// The major version of the format.
const MAJOR: u64 = 1;

/// A shard as the manifest names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// 32 hex digits: the content's name.
    pub name: String,
    /// Rows.
    pub rows: u64,
    /// Prompts whose table entry lies here.
    pub prompts: u64,
    /// Token ids of these prompts.
    pub ids: u64,
    /// Bytes of these prompts' texts.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub text_bytes: u64,
    /// Rows here that belong to the prompt before.
    pub head: u64,
    /// `[site, NaN, infinite, overflowed]` for each site that has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counts: Vec<[u64; 4]>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Entry {
    /// Returns what decides the shard's layout.
    pub fn size(&self) -> Size {
        Size { rows: self.rows, prompts: self.prompts, ids: self.ids, text_bytes: self.text_bytes }
    }

    /// Returns the shard's file name.
    pub fn file_name(&self) -> String {
        shard_file_name(&self.name)
    }
}

/// Returns the file name of the shard called `name`.
pub fn shard_file_name(name: &str) -> String {
    format!("{name}.safetensors")
}

/// Returns whether `file` is a name that only a shard of ours has.
pub fn is_shard_file_name(file: &str) -> bool {
    file.strip_suffix(".safetensors").is_some_and(is_hex_name)
}

fn is_hex_name(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns the file name of version `version`.
pub fn file_name(version: u64) -> String {
    format!("{version:020}.json")
}

/// Versions, windows and sums stay below this, so that counting on never overflows.
const MAX_NUMBER: u64 = 1 << 62;

/// Returns the version that a manifest's file name stands for.
pub fn version_of(file: &str) -> Option<u64> {
    let digits = file.strip_suffix(".json")?;
    let numeric = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let version = if numeric { digits.parse().ok() } else { None };
    version.filter(|version| (1..MAX_NUMBER).contains(version))
}

/// Identity and about are handed on as text; whoever parses them must not run out of stack.
const MAX_DEPTH: usize = 64;

#[derive(Serialize, Deserialize)]
struct Body<'a> {
    lamina: u64,
    store: String,
    version: u64,
    created: u64,
    complete: bool,
    windows: u64,
    identity: Box<RawValue>,
    about: Box<RawValue>,
    #[serde(borrow)]
    groups: Groups<'a>,
}

/// The first group is dense. Further ones are a later version's: their sites are not known here,
/// and nothing else of the store depends on them.
struct Groups<'a> {
    dense: GroupBody<'a>,
    further: u64,
}

impl Serialize for Groups<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        [&self.dense].serialize(serializer)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Groups<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct First<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for First<'a> {
            type Value = Groups<'a>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a list of groups, the first of them dense")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut groups: A) -> Result<Groups<'a>, A::Error> {
                let dense = groups.next_element()?;
                let dense = dense.ok_or_else(|| Error::invalid_length(0, &self))?;
                let mut further = 0;
                while groups.next_element::<IgnoredAny>()?.is_some() {
                    further += 1;
                }
                Ok(Groups { dense, further })
            }
        }

        deserializer.deserialize_seq(First(PhantomData))
    }
}

#[derive(Serialize, Deserialize)]
struct GroupBody<'a> {
    rows_per_shard: u64,
    texts: bool,
    #[serde(borrow)]
    sites: Vec<(String, &'a str, Vec<u64>)>,
    shards: Vec<Entry>,
}

/// One version of a store.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The random id that all versions of a store share.
    pub store: String,
    /// The version.
    pub version: u64,
    /// When version 1 was made, in seconds since 1970.
    pub created: u64,
    /// Whether the capture, or the writer, has ended well.
    pub complete: bool,
    /// Windows done.
    pub windows: u64,
    /// What decides whether the numbers can be reused: JSON.
    pub identity: Box<RawValue>,
    /// What else is known of their making: JSON.
    pub about: Box<RawValue>,
    /// Sites, R, texts.
    pub plan: std::sync::Arc<Plan>,
    /// Shards in row order: full ones, then at most R rows in short ones.
    pub shards: Vec<Entry>,
    /// Groups that a later version of lamina added, and that this one leaves alone.
    pub further_groups: u64,
}

impl Manifest {
    /// Returns rows and prompts in all.
    pub fn totals(&self) -> (u64, u64) {
        self.shards
            .iter()
            .fold((0, 0), |(rows, prompts), shard| (rows + shard.rows, prompts + shard.prompts))
    }

    /// Returns how many shards at the front are full.
    pub fn full_shards(&self) -> usize {
        let rows = self.plan.rows_per_shard();
        self.shards.iter().take_while(|shard| shard.rows == rows).count()
    }

    /// Returns the file's bytes.
    ///
    /// # Errors
    ///
    /// Only what the JSON library says, which never happens for valid raw values.
    pub fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let sites = self
            .plan
            .sites()
            .iter()
            .map(|site| (site.path.clone(), site.dtype.safetensors(), site.shape.clone()))
            .collect();
        let body = Body {
            lamina: MAJOR,
            store: self.store.clone(),
            version: self.version,
            created: self.created,
            complete: self.complete,
            windows: self.windows,
            identity: self.identity.clone(),
            about: self.about.clone(),
            groups: Groups {
                further: 0,
                dense: GroupBody {
                    rows_per_shard: self.plan.rows_per_shard(),
                    texts: self.plan.texts(),
                    sites,
                    shards: self.shards.clone(),
                },
            },
        };
        let mut bytes = serde_json::to_vec(&body)?;
        let check = checksum::name([bytes.as_slice()]);
        bytes.push(b'\n');
        bytes.extend_from_slice(check.as_bytes());
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Returns the manifest that these bytes are.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong with them.
    pub fn decode(bytes: &[u8], version: u64) -> Result<Self, String> {
        let (body, check) = split(bytes).ok_or("it is cut off or not in two lines")?;
        let expected = checksum::name([body]);
        if check != expected.as_bytes() {
            return Err(format!("its checksum is not {expected}, that of its text"));
        }
        let body: Body<'_> =
            serde_json::from_slice(body).map_err(|error| format!("its text is wrong: {error}"))?;
        if body.lamina != MAJOR {
            return Err(format!("it is of format {}, not {MAJOR}", body.lamina));
        }
        if body.version != version {
            return Err(format!("it says that it is version {}", body.version));
        }
        if body.windows >= MAX_NUMBER {
            return Err(format!("it says that {} windows are done", body.windows));
        }
        for text in [body.identity.get(), body.about.get()] {
            if depth(text) > MAX_DEPTH {
                return Err(format!("it nests deeper than {MAX_DEPTH} levels"));
            }
        }
        let Groups { dense: group, further } = body.groups;
        let sites = group
            .sites
            .into_iter()
            .map(|(path, dtype, shape)| {
                let dtype: Dtype = dtype.parse().map_err(|error| format!("{error}"))?;
                Ok(SiteSpec { path, dtype, shape })
            })
            .collect::<Result<Vec<_>, String>>()?;
        let plan = Plan::new(sites, group.rows_per_shard, group.texts)
            .map_err(|error| error.to_string())?;
        check_shards(&plan, &group.shards)?;
        Ok(Self {
            store: body.store,
            version: body.version,
            created: body.created,
            complete: body.complete,
            windows: body.windows,
            identity: body.identity,
            about: body.about,
            plan: std::sync::Arc::new(plan),
            shards: group.shards,
            further_groups: further,
        })
    }
}

/// Returns how deep valid JSON nests.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    let (mut quoted, mut escaped) = (false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'{' | b'[' if !quoted => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = bytes.strip_suffix(b"\n")?;
    let at = text.len().checked_sub(33)?;
    let (body, rest) = text.split_at_checked(at)?;
    Some((body, rest.strip_prefix(b"\n")?))
}

/// Checks what the arithmetic of readers relies on.
fn check_shards(plan: &Plan, shards: &[Entry]) -> Result<(), String> {
    let limit = plan.rows_per_shard();
    let (mut rows, mut prompts, mut counts, mut short_rows) = (0u64, 0u64, 0u64, 0u64);
    let mut short = false;
    for shard in shards {
        if !is_hex_name(&shard.name) {
            return Err(format!("a shard is called {:?}", shard.name));
        }
        if shard.rows > limit || shard.head > shard.rows {
            return Err(format!(
                "shard {} has {} rows, {} head",
                shard.name, shard.rows, shard.head
            ));
        }
        if shard.head > 0 && prompts == 0 {
            return Err(format!("shard {} begins inside no prompt", shard.name));
        }
        short |= shard.rows < limit;
        if short {
            short_rows += shard.rows;
        }
        if short_rows > limit {
            return Err(format!("its short shards have more than {limit} rows"));
        }
        let total = |sum: u64, more: u64| {
            sum.checked_add(more).filter(|&sum| sum < MAX_NUMBER).ok_or("its sums overflow")
        };
        rows = total(rows, shard.rows)?;
        prompts = total(prompts, shard.prompts)?;
        if shard.counts.iter().any(|&[site, ..]| site >= plan.sites().len() as u64) {
            return Err(format!("shard {} counts a site that is not there", shard.name));
        }
        for &[_, nan, infinite, overflow] in &shard.counts {
            for count in [nan, infinite, overflow] {
                counts = total(counts, count)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let site = SiteSpec { path: "model.a.output".into(), dtype: Dtype::F32, shape: vec![4] };
        Manifest {
            store: "ab".repeat(16),
            version: 3,
            created: 1,
            complete: true,
            windows: 2,
            identity: RawValue::from_string(r#"{"model":"x"}"#.into()).unwrap(),
            about: RawValue::from_string("{}".into()).unwrap(),
            plan: std::sync::Arc::new(Plan::new(vec![site], 8, false).unwrap()),
            shards: vec![Entry {
                name: "0123456789abcdef".repeat(2),
                rows: 8,
                prompts: 1,
                ids: 8,
                text_bytes: 0,
                head: 0,
                counts: vec![[0, 1, 2, 3]],
            }],
            further_groups: 0,
        }
    }

    #[test]
    fn a_manifest_reads_back() {
        let bytes = manifest().encode().unwrap();
        let read = Manifest::decode(&bytes, 3).unwrap();
        assert_eq!(read.encode().unwrap(), bytes);
        assert_eq!(read.totals(), (8, 1));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = manifest().encode().unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut wrong = bytes.clone();
                wrong[at] ^= 1 << bit;
                assert!(Manifest::decode(&wrong, 3).is_err(), "byte {at} bit {bit}");
            }
            assert!(Manifest::decode(&bytes[..at], 3).is_err(), "cut at {at}");
        }
        assert!(Manifest::decode(&bytes, 4).is_err(), "under another name");
    }

    fn resealed(change: impl Fn(&str) -> String) -> Result<Manifest, String> {
        let bytes = manifest().encode().unwrap();
        let body = change(std::str::from_utf8(split(&bytes).unwrap().0).unwrap());
        let check = checksum::name([body.as_bytes()]);
        Manifest::decode(format!("{body}\n{check}\n").as_bytes(), 3)
    }

    #[test]
    fn unknown_fields_are_ignored_and_duplicate_ones_refused() {
        assert!(resealed(|body| body.replacen('{', r#"{"later":[1],"#, 1)).is_ok());
        let error = resealed(|body| body.replacen('{', r#"{"windows":1,"#, 1)).unwrap_err();
        assert!(error.contains("duplicate field `windows`"), "{error}");
    }

    #[test]
    fn depth_counts_brackets_outside_strings() {
        assert_eq!(depth(r#"{"a":[1,{"b":"]]}}\"[["}]}"#), 3);
        assert_eq!(depth("1"), 0);
    }

    #[test]
    fn groups_of_a_later_version_are_left_alone() {
        let read = resealed(|body| {
            body.replacen(r"}]}]}", r#"}]},{"kind":"ragged","sites":[["x","F16"]]}]}"#, 1)
        });
        let read = read.unwrap();
        assert_eq!((read.further_groups, read.totals()), (1, (8, 1)));
        assert!(resealed(|body| body.replacen(r"}]}]}", r"}]},7]", 1)).is_err());
    }

    #[test]
    fn hostile_manifests_are_errors() {
        for (from, to) in [
            (r#""name":"0123"#, r#""name":"../3"#),
            (r#""rows":8"#, r#""rows":18446744073709551615"#),
            (r#""rows":8"#, r#""rows":9"#),
            (r#""prompts":1"#, r#""prompts":18446744073709551615"#),
            ("[0,1,2,3]", "[7,1,2,3]"),
            (r#""rows_per_shard":8"#, r#""rows_per_shard":7"#),
            (r#""rows_per_shard":8"#, r#""rows_per_shard":1099511627776"#),
            ("[4]", "[4,4611686018427387904,4]"),
            (r#""F32""#, r#""F33""#),
            (r#""head":0"#, r#""head":9"#),
            (r#""head":0"#, r#""head":1"#),
            (r#""lamina":1"#, r#""lamina":2"#),
        ] {
            let changed = resealed(|body| {
                assert!(body.contains(from), "{from} in {body}");
                body.replacen(from, to, 1)
            });
            assert!(changed.is_err(), "{from} -> {to}");
        }
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        assert!(resealed(|body| body.replacen(r#"{"model":"x"}"#, &deep, 1)).is_err());
    }
}
