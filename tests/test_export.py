"""export.py: our network in transformers' stock classes, theirs in ours, files that both read."""
import json
import math
import os
import re
import resource
import runpy
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, log, refused, run
from test_tokenizer import original

import export
from checkpoint import load_model, read_checkpoint
from generate import generate
from model import Xmodel, XmodelConfig
from tokenizer import EOS_ID, chat_prompt, get_tokenizer, tokenizer_of

transformers = pytest.importorskip('transformers')
pytest.importorskip('safetensors')

SMALL = XmodelConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_ffn=160, vocab_size=512,
                     block_size=256)


def checkpoint(folder, c):
    """A run folder with random weights of a trained model's size."""
    torch.manual_seed(0)
    model = Xmodel(c)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder.mkdir(parents=True)
    torch.save({'config': asdict(c), 'model': model.state_dict()}, folder / 'step_0.pt')
    return model.eval()


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


CONFIGS = {
    'textbook': SMALL, 'authors': replace(SMALL, mup_rules='authors', n_head=2, n_kv_head=1),
    'sp': replace(SMALL, mup_rules='sp', n_kv_head=4, rope_theta=10_000.0, norm_eps=1e-6),
    'scales': replace(SMALL, input_scale=3.0, output_scale=0.7, residual_scale=2.0, n_embd=96,
                      n_ffn=64, attention_scale=1.7, vocab_size=300, mup_base_width=32,
                      norm_eps=0.1)}


@pytest.mark.parametrize('name', CONFIGS)
def test_what_is_written_is_the_same_network_in_stock_transformers(tmp_path, name):
    c = CONFIGS[name]
    model = checkpoint(tmp_path / 'run', c)
    done = run('export.py', tmp_path / 'run', tmp_path / 'hf')
    assert (done.returncode, done.stderr) == (0, '')
    theirs = load(tmp_path / 'hf')
    assert type(theirs) is transformers.GraniteForCausalLM
    idx = torch.randint(c.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, hf = model(idx)[0], theirs(idx).logits
    assert (ours - hf).abs().max() < 1e-5 * max(1, ours.abs().max())
    text = [t.item() for t, _ in generate(model, [idx[0, :8].tolist()], 100, 0.0)]
    ids = theirs.generate(idx[:1, :8], max_new_tokens=100, do_sample=False, eos_token_id=None)
    assert text == ids[0, 8:].tolist()


@pytest.mark.parametrize('form', ['granite', 'xmodel'])
def test_out_and_in_again_is_bit_for_bit(tmp_path, form):
    c = replace(CONFIGS['authors'], input_scale=3.0, output_scale=0.7, residual_scale=2.0,
                mup_base_width=32, norm_eps=0.1)
    model = checkpoint(tmp_path / 'run', c)
    assert run('export.py', tmp_path / 'run', tmp_path / 'hf', f'--format={form}',
               '--shard_gb=0.0001').returncode == 0
    assert len(list((tmp_path / 'hf').glob('model-0*.safetensors'))) > 2
    if form == 'granite':                                        # which goes by the index
        theirs = load(tmp_path / 'hf').state_dict()
        assert torch.equal(theirs['model.layers.2.mlp.up_proj.weight'],
                           model.blocks[2].ffn.gate_up.weight[160:])
    done = run('export.py', '--from_hf', tmp_path / 'hf', tmp_path / 'back')
    assert (done.returncode, done.stderr) == (0, '')
    back, about = load_model(tmp_path / 'back')
    for (name, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for role, rule in model.table.items():
        if rule.multiplier is not None:
            assert back.table[role].multiplier == pytest.approx(rule.multiplier, rel=1e-15), role
    assert back.config.norm_eps == c.norm_eps
    if form == 'xmodel':
        assert about['config'] == c


@pytest.mark.parametrize('kind, knobs', [
    ('Granite', {'embedding_multiplier': 6.0, 'logits_scaling': 13.0, 'residual_multiplier': 0.22,
         'attention_multiplier': 0.0078125, 'rms_norm_eps': 0.1}),
    ('Granite', {'num_key_value_heads': 1, 'hidden_size': 96, 'rms_norm_eps': 1e-6,
                 'vocab_size': 777, 'attention_multiplier': 0.05}),
    ('Llama', {}), ('Llama', {'num_key_value_heads': None, 'hidden_size': 96}),
    ('Llama', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 1234.0}}),
    ('Llama', {'older': {'rope_theta': 1234.0, 'rope_scaling': None}}),
    ('Llama', {'older': {}})])                                   # transformers' own base
def test_models_made_by_transformers_are_read(tmp_path, kind, knobs):
    knobs, older = dict(knobs), knobs.get('older')
    knobs.pop('older', None)
    if older:                                                    # as version 4 wrote it
        knobs['rope_parameters'] = {'rope_type': 'default', 'rope_theta': older['rope_theta']}
    knobs = {'vocab_size': 512, 'hidden_size': 64, 'intermediate_size': 80, 'num_hidden_layers': 3,
             'num_attention_heads': 4, 'num_key_value_heads': 2, 'tie_word_embeddings': True,
             'max_position_embeddings': 128} | knobs
    torch.manual_seed(1)
    theirs = getattr(transformers, f'{kind}ForCausalLM')(
        getattr(transformers, f'{kind}Config')(initializer_range=0.1, **knobs)).eval()
    with torch.no_grad():
        for p in theirs.parameters():                            # gains are not all the same
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / 'hf')
    if older is not None:
        config = json.loads((tmp_path / 'hf/config.json').read_text())
        del config['rope_parameters']
        (tmp_path / 'hf/config.json').write_text(json.dumps(config | older))
    done = run('export.py', '--from_hf', tmp_path / 'hf', tmp_path / 'run')
    assert (done.returncode, done.stderr) == (0, '') and 'as none came with it' in done.stdout
    ours, _ = load_model(tmp_path / 'run')
    idx = torch.randint(knobs['vocab_size'], (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = ours(idx)[0], theirs(idx).logits
    assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def test_the_authors_config_is_read_by_its_keys(tmp_path):
    # as released, in the older file format, with tensors in bf16
    c = replace(CONFIGS['authors'], input_scale=3.0, output_scale=0.7, residual_scale=2.0,
                mup_base_width=32)
    model = checkpoint(tmp_path / 'run', c)
    run('export.py', tmp_path / 'run', tmp_path / 'hf', '--dtype=bf16')
    config = {'architectures': ['XmodelForCausalLM'], 'model_type': 'xmodel', 'hidden_size': 64,
              'intermediate_size': 160, 'num_hidden_layers': 3, 'num_attention_heads': 2,
              'num_key_value_heads': 1, 'vocab_size': 512, 'max_position_embeddings': 256,
              'rms_norm_eps': 1e-5, 'rope_theta': 500000, 'hidden_act': 'silu', 'use_mup': True,
              'tie_word_embeddings': True, 'mup_input_scale': 3.0, 'mup_output_scale': 0.7,
              'mup_attention_residual_scale': 2.0, 'mup_ffn_residual_scale': 2.0,
              'mup_base_width': 32, 'mup_width_multiplier': 2.0, 'rope_scaling': None}
    (tmp_path / 'hf/config.json').write_text(json.dumps(config))
    written = export.hf_config(c, 'xmodel')
    assert {key: written[key] for key in config} == config
    from safetensors.torch import load_file
    torch.save(load_file(tmp_path / 'hf/model.safetensors'), tmp_path / 'hf/pytorch_model.bin')
    (tmp_path / 'hf/model.safetensors').unlink()
    assert run('export.py', '--from_hf', tmp_path / 'hf', tmp_path / 'back').returncode == 0
    back, about = load_model(tmp_path / 'back')
    assert about['config'] == c
    for a, b in zip(model.parameters(), back.parameters()):
        assert torch.equal(a.bfloat16().float(), b)


@pytest.mark.parametrize('vocab_size', [512, 16_384, 129_280])
def test_the_tokenizer_goes_with_it(tmp_path, vocab_size):
    checkpoint(tmp_path / 'run', replace(SMALL, n_layer=1, n_embd=16, n_head=1, n_kv_head=1,
                                         n_ffn=16, vocab_size=vocab_size))
    assert run('export.py', tmp_path / 'run', tmp_path / 'hf').returncode == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ours = get_tokenizer(vocab_size)
    for text in ('def f(x):\n    return x  # 世界 😀\n', (ROOT / 'train.py').read_text(),
                 ' 3.14159 "quoted" naïve\t\u200b゛'):
        assert theirs(text)['input_ids'] == ours.encode_ordinary(text)
        assert theirs.decode(ours.encode_ordinary(text)) == text
    assert theirs.eos_token_id == EOS_ID and theirs.encode(theirs.eos_token) == [EOS_ID]
    turns = [{'role': role, 'content': text} for role, text in
             (('system', 'Be brief.'), ('user', 'Hello'), ('assistant', 'Yes?'), ('user', '1+1'))]
    assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == \
        chat_prompt(turns)
    # as in transformers' own templates: no content, or a list of parts
    odd = [{'role': 'user', 'content': [{'type': 'text', 'text': 'one '}, {'type': 'image'},
                                        {'type': 'text', 'text': 'two'}]},
           {'role': 'assistant', 'content': None}, {'role': 'user', 'content': []}]
    told = theirs.apply_chat_template(odd, tokenize=False, add_generation_prompt=True)
    assert told == chat_prompt(odd) == \
        'User: one two\n\nAssistant: \n\nUser: \n\nAssistant:'
    assert theirs.apply_chat_template(turns[:3], tokenize=False) == \
        chat_prompt(turns[:2]) + ' Yes?' + theirs.eos_token


def test_transformers_continues_a_batch_of_prompts_as_each_alone(exported):
    theirs = transformers.AutoTokenizer.from_pretrained(exported / 'hf')
    model, tokenizer = load_model(exported / 'run')[0], get_tokenizer(SMALL.vocab_size)
    prompts = ['def f(x):\n    return', 'a', 'Question: what is']
    batch = theirs(prompts, padding=True, return_tensors='pt')
    said = load(exported / 'hf').generate(**batch, max_new_tokens=20, do_sample=False,
                                          eos_token_id=None)
    for prompt, row in zip(prompts, said[:, batch['input_ids'].size(1):].tolist()):
        ids = tokenizer.encode_ordinary(prompt)
        assert row == [t.item() for t, _ in generate(model, [ids], 20, 0.0)]


def test_another_models_tokenizer_stays_with_it(exported, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    hf = shutil.copytree(exported / 'hf', tmp_path / 'hf')
    letters = {chr(ord('a') + i % 26) + '!' * (i // 26): i for i in range(512)}
    theirs = Tokenizer(models.WordLevel(letters, unk_token='z'))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.add_special_tokens(['a!'])
    theirs.save(str(hf / 'tokenizer.json'))
    (hf / 'generation_config.json').write_text('{"eos_token_id": [7, 9]}')
    config = json.loads((hf / 'config.json').read_text())
    (hf / 'config.json').write_text(json.dumps(config | {'bos_token_id': 5}))
    done = run('export.py', '--from_hf', hf, tmp_path / 'run')
    assert done.returncode == 0 and 'with a tokenizer of its own' in done.stdout
    about = read_checkpoint(tmp_path / 'run')
    assert (about['bos_id'], about['eos_ids']) == (5, [7, 9])
    read = tokenizer_of(about)
    assert read.encode_ordinary('c b a') == [2, 1, 0] and read.decode([2, 1, 0]) == 'c b a'
    assert 26 not in read.encode_ordinary('a!')                  # text makes no special token
    said = run('sample.py', tmp_path / 'run', '--prompt=c b a', '--max_new_tokens=5')
    assert said.returncode == 0 and said.stdout.startswith('c b a ')
    assert 'a tokenizer of its own' in refused(run('eval.py', tmp_path / 'run'))
    for args in (['train.py', 'config/nano.py', f'--init_from={tmp_path / "run"}',
                  f'--out_dir={tmp_path / "x"}'], ['export.py', tmp_path / 'run', tmp_path / 'x'],
                 ['export.py', tmp_path / 'run', tmp_path / 'x', '--format=gguf']):
        assert 'tokenizer.json' in refused(run(*args)) and not (tmp_path / 'x').exists()


def test_what_came_in_can_be_trained_on(exported, tiny, tmp_path):
    assert run('export.py', '--from_hf', exported / 'hf', tmp_path / 'in').returncode == 0
    done = run('train.py', *tiny, tmp_path / 'in/shape.py', f'--init_from={tmp_path / "in"}',
               '--init_step=0', '--steps_scale=0.2', f'--out_dir={tmp_path / "more"}',
               '--learning_rate=0', '--embedding_lr=0')          # so that it keeps what came in
    assert done.returncode == 0, done.stderr
    weights = (read_checkpoint(tmp_path / name)['model'] for name in ('in', 'more'))
    assert all(map(torch.equal, *(state.values() for state in weights)))


def test_the_model_card_tells_of_the_run(tiny_run, tmp_path):
    assert run('export.py', tiny_run, tmp_path / 'hf', '--dtype=bf16').returncode == 0
    card = (tmp_path / 'hf/README.md').read_text()
    assert '# tiny' in card and 'data_dir' not in card
    assert json.loads((tmp_path / 'hf/config.json').read_text())['dtype'] == 'bfloat16'
    assert 'after 20 steps' in card and '"n_embd": 32' in card and '| stdlib | ' in card
    assert (tmp_path / 'hf/model.safetensors').stat().st_mode == \
        (tmp_path / 'hf/config.json').stat().st_mode
    assert load(tmp_path / 'hf').generation_config.eos_token_id == EOS_ID


def test_the_card_of_an_earlier_checkpoint_has_the_losses_of_its_own_step(tiny_run, tmp_path):
    assert run('export.py', tiny_run / 'step_16.pt', tmp_path / 'hf').returncode == 0
    card, lines = (tmp_path / 'hf/README.md').read_text(), log(tiny_run)
    assert 'after 16 steps' in card and 'After 16 steps:' in card
    told = dict(re.findall(r'^\| (\w+) \| (\d+\.\d+) \|$', card, re.MULTILINE))
    assert told == {name: f'{loss:.4f}' for name, loss in lines[15]['val_losses'].items()}
    assert told != {name: f'{loss:.4f}' for name, loss in lines[19]['val_losses'].items()}


def test_the_13b_model_has_llamas_tensors():
    with torch.device('meta'):
        config = transformers.GraniteConfig(**export.hf_config(XmodelConfig()))
        theirs = {n: tuple(p.shape) for n, p in
                  transformers.GraniteForCausalLM(config).named_parameters()}
    assert {name: shape for _, name, _, shape in export.hf_tensors(XmodelConfig())} == theirs
    assert sum(map(math.prod, theirs.values())) == 1_350_059_520


@pytest.mark.parametrize('dtype, right', [('fp32', 0), ('bf16', 2**-8), ('fp16', 2**-10),
                                          ('q8_0', 2**-6)])
def test_gguf_holds_the_network_and_the_tokenizer(tmp_path, dtype, right):
    gguf = pytest.importorskip('gguf')
    c = replace(CONFIGS['authors'], norm_eps=0.1, vocab_size=129_280 if dtype == 'bf16' else 600)
    model = checkpoint(tmp_path / 'run', c)
    done = run('export.py', tmp_path / 'run', tmp_path / 'm.gguf', '--format=gguf',
               f'--dtype={dtype}')
    assert (done.returncode, done.stderr) == (0, '') and len(os.listdir(tmp_path)) == 2
    file = gguf.GGUFReader(tmp_path / 'm.gguf')
    told = {key: field.contents() for key, field in file.fields.items()}
    factor = {role: rule.multiplier for role, rule in model.table.items()}
    assert {key: value for key, value in told.items() if key.startswith('granite.')} == \
        pytest.approx({'granite.' + key: value for key, value in {
            'block_count': 3, 'context_length': 256, 'embedding_length': 64,
            'feed_forward_length': 160, 'attention.head_count': 2, 'attention.head_count_kv': 1,
            'attention.layer_norm_rms_epsilon': 0.1, 'rope.freq_base': 500_000.0,
            'rope.dimension_count': 32, 'vocab_size': c.vocab_size,
            'embedding_scale': 12.0, 'attention.scale': 1 / 32,
            'residual_scale': 1.4 / math.sqrt(3), 'logit_scale': 1 / factor['logits']}.items()})
    tokens, kinds = told['tokenizer.ggml.tokens'], told['tokenizer.ggml.token_type']
    assert len(tokens) == len(kinds) == c.vocab_size and told['tokenizer.ggml.pre'] == 'deepseek-v3'
    ids = range(min(c.vocab_size, 128_815))
    assert tokens[:len(ids)] == list(map(original().id_to_token, ids))
    assert kinds[:4] == [3, 3, 3, 1] and (c.vocab_size < 10**5 or kinds[-1] == 5)
    assert len(told['tokenizer.ggml.merges']) == min(c.vocab_size, 128_000) - 259
    assert told['tokenizer.ggml.eos_token_id'] == EOS_ID
    found = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type))
             for t in file.tensors}
    state = model.state_dict()
    qkv = state['blocks.1.attn.qkv.weight']
    half = torch.arange(32).view(2, 16).T.flatten()              # 0, 16, 1, 17, ...
    for name, t in {'token_embd': state['embed.weight'], 'output_norm': state['norm.weight'],
                    'blk.0.attn_norm': state['blocks.0.norm1.weight'],
                    'blk.1.attn_q': torch.cat([qkv[:32][half], qkv[32:64][half]]),
                    'blk.1.attn_k': qkv[64:96][half], 'blk.1.attn_v': qkv[96:],
                    'blk.1.attn_output': state['blocks.1.attn.out.weight'],
                    'blk.2.ffn_gate': state['blocks.2.ffn.gate_up.weight'][:160],
                    'blk.2.ffn_up': state['blocks.2.ffn.gate_up.weight'][160:],
                    'blk.2.ffn_down': state['blocks.2.ffn.down.weight'],
                    'blk.2.ffn_norm': state['blocks.2.norm2.weight']}.items():
        assert (found[f'{name}.weight'] - t).abs().max() <= right * t.abs().max(), name
    assert len(found) == 2 + 3 * 9


WRONG_CONFIG = {
    'model_type': ('gpt2', "model_type is 'gpt2'"), 'hidden_act': ('gelu', "hidden_act is 'gelu'"),
    'attention_bias': (True, 'attention_bias is True'), 'mlp_bias': (True, 'mlp_bias is True'),
    'rope_parameters': ({'rope_type': 'yarn', 'factor': 4.0}, "rope_parameters is {'rope_type': "),
    'rope_scaling': ({'type': 'linear', 'factor': 4.0}, "rope_scaling is {'type': 'linear'"),
    'num_attention_heads': (0, 'num_attention_heads is 0, which should be a whole number above 0'),
    'logits_scaling': (0, 'logits_scaling is 0, which should be a number above 0'),
    'embedding_multiplier': ('12', "embedding_multiplier is '12'"),
    'tie_word_embeddings': (False, 'tie_word_embeddings is False'),
    'head_dim': (32, 'head_dim is 32'), 'num_hidden_layers': ('3', "num_hidden_layers is '3'"),
    'intermediate_size': (80, 'model.layers.0.mlp.gate_proj.weight is (160, 64), by config.json'),
}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    checkpoint(folder / 'run', SMALL)
    assert run('export.py', folder / 'run', folder / 'hf').returncode == 0
    return folder


@pytest.mark.parametrize('key', WRONG_CONFIG)
def test_what_our_network_does_not_have_is_refused_by_name(exported, tmp_path, key):
    value, says = WRONG_CONFIG[key]
    hf = tmp_path / 'hf'
    hf.mkdir()
    os.symlink(exported / 'hf/model.safetensors', hf / 'model.safetensors')
    config = json.loads((exported / 'hf/config.json').read_text())
    (hf / 'config.json').write_text(json.dumps(config | {key: value}))
    line = refused(run('export.py', '--from_hf', hf, tmp_path / 'run'))
    assert says in line and str(hf) in line and os.listdir(tmp_path) == ['hf']


def broken(folder):
    checkpoint(folder, replace(SMALL, mup_break='attn_scale'))
    return folder


def checkpoint_of(folder, **shape):
    checkpoint(folder, replace(SMALL, **shape))
    return folder


def large(exported, folder):
    state = torch.load(exported / 'run/step_0.pt', weights_only=True)
    state['model']['blocks.1.ffn.down.weight'][3, 4] = 1e6
    folder.mkdir()
    torch.save(state, folder / 'step_0.pt')
    return folder


def with_tensors(exported, folder, what='', **tensors):
    from safetensors.torch import load_file, save_file
    folder.mkdir()
    (folder / 'config.json').write_text((exported / 'hf/config.json').read_text())
    found = load_file(exported / 'hf/model.safetensors')
    for name, t in tensors.items():
        found.pop(name, None)
        found |= {name: t} if t is not None else {}
    save_file(found, folder / 'model.safetensors')
    if what == 'other':
        save_file({'model.norm.weight': torch.ones(64)}, folder / 'other.safetensors')
    elif what == 'broken':
        (folder / 'tokenizer.json').write_text('{')
    return folder


def folder_with(exported, folder, name, text):
    """A folder with the exported config.json, and this file."""
    folder.mkdir()
    shutil.copy(exported / 'hf/config.json', folder)
    (folder / name).write_text(text)
    return folder


def with_odd_end(exported, folder):
    folder_with(exported, folder, 'tokenizer.json', json.dumps(
        {'model': {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}}))
    (folder / 'generation_config.json').write_text('{"eos_token_id": "end"}')
    shutil.copy(exported / 'hf/model.safetensors', folder)
    return folder


WRONG = {   # name: (arguments from (exported, tmp_path), what the line tells)
    'no arguments': (lambda e, t: [], 'two paths are wanted'),
    'no run': (lambda e, t: [t / 'none', t / 'hf'], 'does not exist'),
    'long name': (lambda e, t: [e / 'run', 'x' * 300], 'File name too long'),
    'in, as out': (lambda e, t: ['--from_hf', e / 'hf', t / 'run', '--dtype=bf16'], 'as they are'),
    'mup_break': (lambda e, t: [broken(t / 'x'), t / 'hf', '--format=xmodel'], 'has no keys for'),
    'too large': (lambda e, t: [large(e, t / 'x'), t / 'hf', '--dtype=fp16'],
                  'is not finite in fp16'),
    'too large for llama.cpp': (lambda e, t: [large(e, t / 'x'), t / 'hf', '--dtype=q8_0',
                                              '--format=gguf'], 'is not finite in q8_0'),
    'twice': (lambda e, t: ['--from_hf', with_tensors(e, t / 'x', 'other'), t / 'run'],
              'as another file of the folder has'),
    'a tokenizer without words': (lambda e, t: ['--from_hf', with_tensors(e, t / 'x', 'broken'),
                                                t / 'run'], 'tokenizer.json'),
    'there already': (lambda e, t: [e / 'run', e / 'hf'], 'exists already'),
    'dtype': (lambda e, t: [e / 'run', t / 'hf', '--dtype=int8'], "'fp32', 'bf16', 'fp16'"),
    'q8_0': (lambda e, t: [e / 'run', t / 'hf', '--dtype=q8_0'], 'dtype=q8_0 is for format=gguf'),
    'shards': (lambda e, t: [e / 'run', t / 'hf', '--shard_gb=0.0'], 'shard_gb=0.0'),
    'third argument': (lambda e, t: [e / 'run', t / 'hf', 'more'], 'more'),
    'no config.json': (lambda e, t: ['--from_hf', t, t / 'run'], 'config.json: No such file'),
    'in from a file': (lambda e, t: ['--from_hf', e / 'run/step_0.pt', t / 'run'], 'is no folder'),
    'untied': (lambda e, t: ['--from_hf', with_tensors(
        e, t / 'x', **{'lm_head.weight': torch.ones(512, 64)}), t / 'run'],
               'lm_head.weight differs'),
    'biases': (lambda e, t: ['--from_hf', with_tensors(
        e, t / 'x', **{'model.layers.0.mlp.up_proj.bias': torch.ones(160)}), t / 'run'],
               'no tensor model.layers.0.mlp.up_proj.bias'),
    'lacking': (lambda e, t: ['--from_hf', with_tensors(
        e, t / 'x', **{'model.norm.weight': None}), t / 'run'],
                'lacks the tensor model.norm.weight'),
    'q8_0 of odd sizes': (lambda e, t: [checkpoint_of(t / 'x', n_ffn=144), t / 'm', '--dtype=q8_0',
                                        '--format=gguf'], 'n_ffn to be multiples of 32'),
    'a folder called .gguf': (lambda e, t: [e / 'run', t / 'm.gguf'], 'with --format=gguf this'),
    'no object': (lambda e, t: ['--from_hf', folder_with(e, t / 'x', 'config.json', '[]'),
                                t / 'run'],
                  'config.json should hold an object'),
    'no JSON': (lambda e, t: ['--from_hf', folder_with(e, t / 'x', 'config.json', '{'), t / 'run'],
                'config.json: Expecting'),
    'no weights': (lambda e, t: ['--from_hf', folder_with(e, t / 'x', 'LICENSE', ''), t / 'run'],
                   'holds no weights'),
    'damaged': (lambda e, t: ['--from_hf', folder_with(e, t / 'x', 'model.safetensors', 'x'),
                              t / 'run'], 'model.safetensors is damaged'),
    'damaged .bin': (lambda e, t: ['--from_hf', folder_with(e, t / 'x', 'pytorch_model.bin', 'x'),
                                   t / 'run'], 'pytorch_model.bin is damaged'),
    'an old tokenizer': (lambda e, t: ['--from_hf', folder_with(e, t / 'x', 'tokenizer.model', 'x'),
                                       t / 'run'], 'a tokenizer.json is wanted'),
    'an end that is no id': (lambda e, t: ['--from_hf', with_odd_end(e, t / 'x'), t / 'run'],
                             "'end' is no id of a token"),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_use_gets_one_line(exported, tmp_path, name):
    args, says = WRONG[name]
    args = args(exported, tmp_path)
    assert says in refused(run('export.py', *args))
    assert set(os.listdir(tmp_path)) <= {'x'}                    # nothing is left, hidden or not


@pytest.mark.parametrize('flags', [['--format=granite'], ['--format=gguf']])
def test_a_full_disk_gets_one_line_and_leaves_nothing(exported, tmp_path, flags):
    line = refused(run('export.py', exported / 'run', tmp_path / 'new', *flags,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5,) * 2)))
    assert f'{tmp_path}/new: ' in line and os.listdir(tmp_path) == []


def test_branches_that_are_scaled_differently_are_not_ours():
    config = export.hf_config(SMALL, 'xmodel') | {'mup_ffn_residual_scale': 1.0}
    with pytest.raises(ValueError, match='mup_attention_residual_scale is 1.4 and'):
        export.our_config(config)


@pytest.mark.parametrize('write, fails', [('export', 'write_weights'),
                                          ('write_gguf', 'add_weights')])
def test_a_stopped_export_leaves_nothing(exported, tmp_path, monkeypatch, write, fails):
    def ctrl_c(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(export, fails, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        getattr(export, write)(exported / 'run', tmp_path / 'new')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('package, flag', [('safetensors', '--format=granite'),
                                           ('gguf', '--format=gguf')])
def test_a_missing_extra_gets_one_line(exported, tmp_path, monkeypatch, capsys, package, flag):
    for name in (package, f'{package}.torch'):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ['export.py', str(exported / 'run'), str(tmp_path / 'x'), flag]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / 'export.py'), run_name='__main__')
    assert e.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f'export.py: {package} is missing: pip install {package}\n'
