//! Paths: what parses prints canonically, order is structural, patterns become sites.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]
use std::collections::BTreeMap;

use lamina_core::path::{
    Element, FindError, List, ModuleTree, Path, PathError, Selector, SiteIndex, Slice,
};
use proptest::prelude::*;

fn path(text: &str) -> Path {
    text.parse().unwrap()
}

fn texts(paths: &[Path]) -> Vec<String> {
    paths.iter().map(ToString::to_string).collect()
}

/// The modules of a small Llama: the root's child is called `model`.
fn llama() -> ModuleTree {
    let inner = (0..12).flat_map(|layer| {
        ["", ".self_attn", ".self_attn.q_proj", ".mlp"]
            .map(|module| format!("model.layers.{layer}{module}"))
    });
    let outer = [
        "",
        "model",
        "model.embed_tokens",
        "model.layers",
        "model.norm",
        "lm_head",
    ];
    ModuleTree::new(outer.map(String::from).into_iter().chain(inner))
}

fn expand(text: &str) -> Vec<String> {
    texts(&llama().expand(&path(text)).unwrap())
}

fn expand_error(text: &str) -> String {
    llama().expand(&path(text)).unwrap_err().to_string()
}

// ---- properties ----

fn index() -> impl Strategy<Value = i64> {
    prop_oneof![-9..10_i64, any::<i64>()]
}

fn name() -> impl Strategy<Value = String> {
    let plain = prop_oneof![
        Just("h".to_owned()),
        Just("output".to_owned()),
        Just("grad".to_owned()),
        Just("02".to_owned()),
        Just("-1".to_owned()),
        "[a-z_]{1,8}",
    ];
    prop_oneof![3 => plain, 1 => "[^.\\[\\]@\\s]{1,6}"]
}

/// White space that may stand inside brackets.
fn space() -> impl Strategy<Value = String> {
    prop_oneof![4 => Just(String::new()), 1 => "[ \t\n\u{a0}]{1,2}"]
}

fn selector() -> impl Strategy<Value = String> {
    let bound = || {
        prop::option::of(index()).prop_map(|bound| bound.map_or(String::new(), |b| b.to_string()))
    };
    let step = prop_oneof![
        Just(String::new()),
        Just(":".to_owned()),
        (1..9_i64).prop_map(|s| format!(":{s}"))
    ];
    let slice = (bound(), bound(), step, space())
        .prop_map(|(start, stop, step, space)| format!("{start}{space}:{space}{stop}{step}"));
    let list = (prop::collection::vec(index(), 1..5), space()).prop_map(|(entries, space)| {
        let entries: Vec<_> = entries
            .iter()
            .map(|entry| format!("{space}{entry}{space}"))
            .collect();
        format!("{},", entries.join(","))
    });
    let inside =
        prop_oneof![3 => index().prop_map(|index| index.to_string()), 1 => slice, 1 => list];
    (space(), inside, space())
        .prop_map(|(before, inside, after)| format!("[{before}{inside}{after}]"))
}

/// Texts that follow the grammar, canonical or not.
fn valid() -> impl Strategy<Value = String> {
    let step = prop_oneof![
        3 => name().prop_map(|name| format!(".{name}")),
        1 => (0..99_u32).prop_map(|index| format!(".{index}")),
        2 => selector(),
    ];
    let call = prop_oneof![
        4 => Just(String::new()),
        1 => (0..5_u32).prop_map(|call| format!("@{call}")),
        1 => (0..5_u32, 1..5_u32).prop_map(|(start, more)| format!("@{start}:{}", start + more)),
        1 => Just("@:".to_owned()),
        1 => (0..5_u32).prop_map(|call| format!("@{call}:")),
    ];
    let element = prop_oneof![
        index().prop_map(|index| format!("[ {index}]")),
        name()
            .prop_filter("a port or gradient", |name| !["input", "output", "grad"]
                .contains(&&**name))
            .prop_map(|name| format!(".{name}")),
    ];
    (
        prop::collection::vec(step, 0..6),
        prop_oneof![Just(".input"), Just(".output")],
        call,
        prop::collection::vec(element, 0..3),
        prop_oneof![2 => Just(""), 1 => Just(".grad")],
        prop_oneof![2 => Just(String::new()), 1 => selector()],
    )
        .prop_map(|(steps, port, call, elements, grad, position)| {
            format!(
                "model{}{port}{call}{}{grad}{position}",
                steps.concat(),
                elements.concat()
            )
        })
}

/// Texts near the grammar: any text over its own characters and words.
fn near() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "model",
        ".",
        "output",
        "input",
        ".output",
        "[",
        "]",
        ":",
        ",",
        "-",
        "0",
        "7",
        "02",
        "@",
        "grad",
        " ",
        "h",
        "\u{e9}",
        "\u{1f98a}",
        "9223372036854775808",
        "\0",
    ]);
    prop::collection::vec(word, 0..14).prop_map(|words| format!("model{}", words.concat()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn printing_is_canonical_for_everything_that_parses(text in valid()) {
        let parsed = path(&text);
        let printed = parsed.to_string();
        prop_assert_eq!(&path(&printed), &parsed);
        prop_assert_eq!(path(&printed).to_string(), printed);
    }

    #[test]
    fn near_misses_parse_to_a_fixed_point_or_name_a_byte_of_the_text(text in near()) {
        match text.parse::<Path>() {
            Ok(parsed) => prop_assert_eq!(path(&parsed.to_string()), parsed),
            Err(PathError::Syntax { at, .. }) => prop_assert!(text.is_char_boundary(at)),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>()) {
        let _ = text.parse::<Path>();
        let _ = format!("model.{text}.output").parse::<Path>();
    }

    #[test]
    fn no_lookup_panics(names in prop::collection::vec("[a-c0-9.\\[ ]{0,7}", 0..20), text in valid()) {
        let tree = ModuleTree::new(&names);
        let _ = tree.expand(&path(&text));
        let index = SiteIndex::new(&names, BTreeMap::new());
        let _ = index.find(&text);
    }

    #[test]
    fn expansion_of_a_slice_is_that_of_python(
        start in prop::option::of(-15..15_i64), stop in prop::option::of(-15..15_i64), every in 1..5_i64,
    ) {
        let selector = Slice::new(start, stop, Some(every)).unwrap();
        let bound = |bound: Option<i64>, otherwise: i64| match bound {
            Some(from_end @ ..0) => (from_end + 12).max(0),
            Some(bound) => bound.min(12),
            None => otherwise,
        };
        let expected: Vec<_> = (bound(start, 0)..bound(stop, 12))
            .step_by(usize::try_from(every).unwrap())
            .map(|layer| format!("model.model.layers[{layer}].output"))
            .collect();
        let found = llama().expand(&path(&format!("model.model.layers{selector}.output")));
        prop_assert_eq!(found.map(|paths| texts(&paths)).unwrap_or_default(), expected);
    }

    #[test]
    fn a_site_is_found_by_its_text_at_any_position(site in valid(), position in index()) {
        let site = path(&site);
        if !site.is_concrete() || site.position().is_some() {
            return Ok(());
        }
        let position = Selector::Index(position);
        let index = SiteIndex::new([site.to_string()], BTreeMap::new());
        prop_assert_eq!(index.find(&site.to_string()).unwrap(), [(0, None)]);
        let target = site.at(position.clone()).unwrap();
        prop_assert_eq!(index.find(&target.to_string()).unwrap(), [(0, Some(position.clone()))]);
        prop_assert_eq!(target.split(site.elements().len()).unwrap(), (site, Some(position)));
    }
}

// ---- the parts ----

#[test]
fn an_error_gives_the_byte_what_was_expected_and_what_was_found() {
    let error = "model.h[2".parse::<Path>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid path `model.h[2` at byte 9: expected `]`, found end of input"
    );
}

#[test]
fn long_texts_and_lists_are_refused() {
    let text = format!("model.{}.output", "a".repeat(70_000));
    assert_eq!(
        text.parse::<Path>().unwrap_err().to_string(),
        "invalid path of 70013 bytes: at most 65536 are read"
    );
    let list = vec!["1"; 4097].join(",");
    let error = format!("model.h[{list}].output")
        .parse::<Path>()
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("expected `]` after 4096 indices, the limit, found `1`"),
        "{error}"
    );
    assert!(error.len() < 300, "{error}");
    assert_eq!(
        List::new(vec![0; 5000]),
        Err(PathError::LongList { entries: 5000 })
    );
}

#[test]
fn deep_paths_cost_memory_and_no_stack() {
    let deep = ".a".repeat(32_000);
    let tree = ModuleTree::new([deep.trim_start_matches('.')]);
    let site = path(&format!("model{deep}.output"));
    assert_eq!(tree.expand(&site).unwrap(), [site]);
    assert!(
        tree.expand(&path(&format!("model{deep}.b.output")))
            .is_err()
    );
}

#[test]
fn order_is_structural() {
    let sorted = [
        "model.input",
        "model.output",
        "model[2].output",
        "model.h[:].output",
        "model.h[0,1].output",
        "model.h[-2].output",
        "model.h[2].input",
        "model.h[2].input@1",
        "model.h[2].output",
        "model.h[2].output[:]",
        "model.h[2].output.grad",
        "model.h[2].output.grad[0]",
        "model.h[2].output[-4]",
        "model.h[2].output[-1]",
        "model.h[2].output[0]",
        "model.h[2].output[10]",
        "model.h[2].output.a",
        "model.h[2].output@2",
        "model.h[2].output@10",
        "model.h[2].mlp.output",
        "model.h[10].output",
        "model.ln_f.output",
    ];
    let mut paths: Vec<_> = sorted.iter().rev().map(|text| path(text)).collect();
    paths.sort();
    assert_eq!(texts(&paths), sorted);
}

#[test]
fn splitting_follows_the_structure() {
    let both = path("model.attn.output[0][-1]");
    assert_eq!(
        both.split(1).unwrap(),
        (path("model.attn.output[0]"), Some(Selector::Index(-1)))
    );
    assert_eq!(path("model.attn.output[0]").split(1).unwrap().1, None);
    assert_eq!(
        both.split(0).unwrap_err().to_string(),
        "`model.attn.output[0][-1]` has `[0][-1]` after the 0 elements of its port: \
         expected one bracket at most, the position"
    );
    assert_eq!(
        path("model.attn.output").split(1).unwrap_err().to_string(),
        "`model.attn.output` names 0 of the 1 elements that lead to a tensor of its port"
    );
    let named = path("model.attn.output.last.first").split(1).unwrap_err();
    assert!(named.to_string().contains("has `.first` after"), "{named}");
    let gradient = path("model.attn.output[0].grad[3]");
    assert_eq!(gradient.elements(), [Element::Index(0)]);
    assert_eq!(gradient.split(1).unwrap().1, Some(Selector::Index(3)));
    assert!(gradient.split(0).is_err());
}

#[test]
fn a_site_takes_one_position() {
    let at = path("model.output")
        .at(Selector::List(List::new(vec![3]).unwrap()))
        .unwrap();
    assert_eq!(at.to_string(), "model.output[3,]");
    assert_eq!(path("model.output[3,]"), at);
    assert_eq!(
        at.at(Selector::Index(0)).unwrap_err().to_string(),
        "`model.output[3,]` has a position already"
    );
    let gradient = path("model.output.grad").at(Selector::Index(-1)).unwrap();
    assert_eq!(gradient, path("model.output.grad[-1]"));
}

#[test]
fn a_pattern_has_no_module() {
    assert_eq!(
        path("model.h[2].mlp.output@2[:]").module().unwrap(),
        "h.2.mlp"
    );
    assert_eq!(path("model.input").module().unwrap(), "");
    assert_eq!(
        path("model.h[-1].output").module().unwrap_err().to_string(),
        "`model.h[-1].output` is a pattern, not one module: expand it against a model first"
    );
}

// ---- expansion ----

#[test]
fn three_texts_of_one_site_expand_to_its_root_form() {
    for text in [
        "model.layers[2].output",
        "model.layers.2.output",
        "model.model.layers[2].output",
    ] {
        assert_eq!(expand(text), ["model.model.layers[2].output"]);
    }
}

#[test]
fn the_root_form_is_tried_before_the_own_name() {
    let tree = ModuleTree::new(["", "h", "model", "model.h"]);
    let found = |text: &str| texts(&tree.expand(&path(text)).unwrap());
    assert_eq!(found("model.h.output"), ["model.h.output"]);
    assert_eq!(found("model.model.h.output"), ["model.model.h.output"]);
    assert_eq!(found("model.model.output"), ["model.model.output"]);
    assert_eq!(found("model.output"), ["model.output"]);
}

#[test]
fn patterns_expand_in_order_and_once() {
    let layers = |numbers: &[u8]| -> Vec<String> {
        numbers
            .iter()
            .map(|number| format!("model.model.layers[{number}].mlp.output[-1]"))
            .collect()
    };
    assert_eq!(expand("model.layers[-1].mlp.output[-1]"), layers(&[11]));
    assert_eq!(
        expand("model.layers[::4].mlp.output[-1]"),
        layers(&[0, 4, 8])
    );
    assert_eq!(
        expand("model.layers[7, 0, -5, 7].mlp.output[-1]"),
        layers(&[0, 7])
    );
    assert_eq!(
        expand("model.layers[10:99].mlp.output[-1]"),
        layers(&[10, 11])
    );
}

#[test]
fn what_an_index_or_slice_misses_is_told() {
    assert_eq!(
        expand_error("model.layers[12].output"),
        "`model.layers[12].output` names nothing here: \
         `model.model.layers` has 12 entries, [0] to [11], and no [12]"
    );
    assert_eq!(
        expand_error("model.layers[0,40].output"),
        "`model.layers[0,40].output` names nothing here: \
         `model.model.layers` has 12 entries, [0] to [11], and no [40]"
    );
    assert_eq!(
        expand_error("model.layers[20:].output"),
        "`model.layers[20:].output` names nothing here: \
         `[20:]` selects none of the 12 in `model.model.layers`"
    );
}

#[test]
fn the_nearest_real_names_are_listed() {
    let cases = [
        ("model.layer[2].output", "model.model.layers[2].output"),
        (
            "model.layers[:].mpl.output",
            "model.model.layers[:].mlp.output",
        ),
        (
            "model.layers[3].attn.input",
            "model.model.layers[3].self_attn.input",
        ),
        ("model.h[0].output", "model.model.layers[0].output"),
        ("model.lm_haed.output", "model.lm_head.output"),
        ("model.lm_head[0].output", "model.lm_head.output"),
        (
            "model.transformer.layers[4].mlp.output",
            "model.model.layers[4].mlp.output",
        ),
    ];
    for (text, nearest) in cases {
        let FindError::Unknown { nearest: found, .. } = llama().expand(&path(text)).unwrap_err()
        else {
            panic!("{text}");
        };
        assert_eq!(
            found.first().map(String::as_str),
            Some(nearest),
            "{text}: {found:?}"
        );
        assert!(found.len() <= 3, "{found:?}");
    }
}

#[test]
fn numbers_with_gaps_count_from_the_highest() {
    let tree = ModuleTree::new([
        "experts",
        "experts.3",
        "experts.7",
        "experts.07",
        "experts.x",
    ]);
    let found = |text: &str| tree.expand(&path(text)).map(|paths| texts(&paths));
    assert_eq!(
        found("model.experts[:].output").unwrap(),
        ["model.experts[3].output", "model.experts[7].output"]
    );
    assert_eq!(
        found("model.experts[-1].output").unwrap(),
        ["model.experts[7].output"]
    );
    assert_eq!(
        found("model.experts.07.output").unwrap(),
        ["model.experts.07.output"]
    );
    assert_eq!(
        found("model.experts[-3].output").unwrap_err().to_string(),
        "`model.experts[-3].output` names nothing here: \
         `model.experts` has no [-3], which is [5]; nearest: [3], [7]"
    );
}

#[test]
fn a_slice_takes_the_branches_that_have_the_rest_and_a_list_entry_must_have_it() {
    let tree = ModuleTree::new(["h.0", "h.0.mlp", "h.1", "h.1.moe", "h.2", "h.2.mlp"]);
    let found = |text: &str| tree.expand(&path(text)).map(|paths| texts(&paths));
    assert_eq!(
        found("model.h[:].mlp.output").unwrap(),
        ["model.h[0].mlp.output", "model.h[2].mlp.output"]
    );
    assert_eq!(
        found("model.h[0,1].mlp.output").unwrap_err().to_string(),
        "`model.h[1].mlp.output` names nothing here; nearest: \
         `model.h[0].mlp.output`, `model.h[2].mlp.output`, `model.h[1].output`"
    );
    assert!(
        found("model.h.output").is_err(),
        "a module that is not listed is none"
    );
}

#[test]
fn modules_that_no_path_can_write_are_left_out() {
    let tree = ModuleTree::new(["", "a b", "a b.c", "x[0]", "y@z", "", ".."]);
    assert_eq!(
        texts(&tree.expand(&path("model.output")).unwrap()),
        ["model.output"]
    );
    assert!(tree.expand(&path("model.x[0].output")).is_err());
}

// ---- lookup ----

#[test]
fn brackets_mean_what_was_recorded() {
    let sites = [
        "model.a.output",
        "model.a.attn.output[0]",
        "model.a.attn.output[1]",
        "model.b.output",
        "model.b.output[2]",
    ];
    let index = SiteIndex::new(sites, BTreeMap::new());
    let find = |text: &str| index.find(text);
    assert_eq!(
        find("model.a.output[0]").unwrap(),
        [(0, Some(Selector::Index(0)))]
    );
    assert_eq!(find("model.a.attn.output[0]").unwrap(), [(1, None)]);
    assert_eq!(
        find("model.a.attn.output[1][-1]").unwrap(),
        [(2, Some(Selector::Index(-1)))]
    );
    assert_eq!(
        find("model.b.output[2]").unwrap(),
        [(4, None)],
        "the longest recorded element wins"
    );
    assert_eq!(
        find("model.b.output[3]").unwrap(),
        [(3, Some(Selector::Index(3)))]
    );
    assert_eq!(
        find("model.a.attn.output").unwrap_err().to_string(),
        "`model.a.attn.output` names none of the recorded elements of its port; recorded: \
         `model.a.attn.output[0]`, `model.a.attn.output[1]`"
    );
    assert_eq!(
        find("model.a.outptu.output").unwrap_err().to_string(),
        "`model.a.outptu.output` names nothing here; nearest: `model.a.output`"
    );
}

#[test]
fn lookup_gives_sites_in_store_order_by_root_form_or_own_name() {
    let sites: Vec<_> = (0..12)
        .rev()
        .step_by(2)
        .map(|layer| format!("model.model.layers[{layer}].output"))
        .collect();
    let index = SiteIndex::new(&sites, BTreeMap::from([("model.layers".to_owned(), 13)]));
    let numbers = |text: &str| {
        index
            .find(text)
            .map(|found| found.iter().map(|(site, _)| *site).collect::<Vec<_>>())
    };
    assert_eq!(
        numbers("model.layers[:].output[-4:]").unwrap(),
        [0, 1, 2, 3, 4, 5]
    );
    assert_eq!(numbers("model.layers[1, 11].output").unwrap(), [0, 5]);
    assert_eq!(numbers("model.layers.11.output").unwrap(), [0]);
    assert_eq!(
        numbers("model.layers[-2].output").unwrap(),
        [0],
        "counted from the model's end"
    );
    assert_eq!(
        numbers("model.layers[-1].output").unwrap_err().to_string(),
        "`model.layers[-1].output` names nothing here: `model.model.layers` has no [-1], \
         which is [12]; nearest: [5], [7], [9], [11]"
    );
    let lengths = llama().lengths(&[path("model.model.layers[3].output")]);
    assert_eq!(lengths, BTreeMap::from([("model.layers".to_owned(), 12)]));
}

#[test]
fn calls_ports_and_gradients_are_told_apart() {
    let sites = [
        "model.a.output",
        "model.a.output@1",
        "model.a.output@2",
        "model.a.input",
        "model.a.output.grad",
    ];
    let index = SiteIndex::new(sites, BTreeMap::new());
    let numbers = |text: &str| {
        index
            .find(text)
            .unwrap()
            .iter()
            .map(|(site, _)| *site)
            .collect::<Vec<_>>()
    };
    assert_eq!(numbers("model.a.output@0[3]"), [0]);
    assert_eq!(numbers("model.a.output@:"), [0, 1, 2]);
    assert_eq!(numbers("model.a.output@1:[-1]"), [1, 2]);
    assert_eq!(numbers("model.a.input[:]"), [3]);
    assert_eq!(numbers("model.a.output.grad[7]"), [4]);
}
