//! Limits, order, splitting, positions.

use lamina_core::path::{Element, List, ModuleTree, Path, PathError, Selector};

use crate::{path, texts};

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
    let error = format!("model.h[{list}].output").parse::<Path>().unwrap_err().to_string();
    assert!(error.ends_with("expected `]` after 4096 indices, the limit, found `1`"), "{error}");
    assert!(error.len() < 300, "{error}");
    assert_eq!(List::new(vec![0; 5000]), Err(PathError::LongList { entries: 5000 }));
}

#[test]
fn deep_paths_cost_memory_and_no_stack() {
    let deep = ".a".repeat(32_000);
    let tree = ModuleTree::new([deep.trim_start_matches('.')]);
    let site = path(&format!("model{deep}.output"));
    assert_eq!(tree.expand(&site).unwrap(), [site]);
    assert!(tree.expand(&path(&format!("model{deep}.b.output"))).is_err());
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
    assert_eq!(both.split(1).unwrap(), (path("model.attn.output[0]"), Some(Selector::Index(-1))));
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
    let at = path("model.output").at(Selector::List(List::new(vec![3]).unwrap())).unwrap();
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
    assert_eq!(path("model.h[2].mlp.output@2[:]").module().unwrap(), "h.2.mlp");
    assert_eq!(path("model.input").module().unwrap(), "");
    assert_eq!(
        path("model.h[-1].output").module().unwrap_err().to_string(),
        "`model.h[-1].output` is a pattern, not one module: expand it against a model first"
    );
}
