"""Weights out to Hugging Face's format and in from it. Our network is transformers' Granite.

    python export.py out/proxy20m hf/proxy20m                   # for transformers, vLLM, lm-eval
    python export.py out/xmodel25 hf/xmodel25 --format=xmodel --dtype=bf16      # as the authors do
    python export.py out/proxy20m proxy20m.gguf --format=gguf   # llama.cpp, Ollama, LM Studio
    python export.py --from_hf hf/proxy20m out/imported         # back in; or anyone's Granite,
                                                                # Xmodel-2.5 or Llama, if tied

µP asks of the forward pass four constants: factors of embedding, q·k, residual branches and logits.
IBM's Granite 3 (transformers' GraniteForCausalLM) is a Llama with just these, so what is written
here runs with no code of ours. The other way a Granite of any factors, or a Llama (all of them 1,
but for q·k / sqrt(hd)), is an Xmodel with other scales. What training needs besides, the rules for
init and learning rates, has no place in Granite's config: shape.py says what was assumed.
"""
import json
import math
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import read_checkpoint, replace_file
from configurator import configure, fail
from model import Xmodel, XmodelConfig, mup_table
from tokenizer import (
    BOS_ID,
    CHAT_TEMPLATE,
    EOS_ID,
    PAD_ID,
    PADDED,
    SMALLEST,
    OtherTokenizer,
    tokenizer_json,
)

source = ''                   # a run's folder or step_N.pt; with from_hf: Hugging Face's folder
target = ''                   # a new folder to write; with format=gguf a new file
from_hf = False               # the other way: from Hugging Face's format to a run's folder
format = 'granite'            # 'granite' | 'xmodel' | 'gguf': xmodel has the authors' config keys
dtype = 'fp32'                # 'fp32' | 'bf16' | 'fp16' | 'q8_0': of weights out; q8_0: gguf alone
shard_gb = 5.0                # weights beyond this go into several files

# dtype: (safetensors', GGUF's, what GGUF calls a file of it)
DTYPES = {'fp32': (torch.float32, 'F32', 'ALL_F32'), 'fp16': (torch.float16, 'F16', 'MOSTLY_F16'),
          'bf16': (torch.bfloat16, 'BF16', 'MOSTLY_BF16'), 'q8_0': (None, 'Q8_0', 'MOSTLY_Q8_0')}
# our modules, and Llama's that each of them fuses, in the order of its rows
MODULES = {'embed': ['model.embed_tokens'], 'norm': ['model.norm']}
IN_A_BLOCK = {'norm1': ['input_layernorm'], 'norm2': ['post_attention_layernorm'],
              'attn.qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
              'attn.out': ['self_attn.o_proj'],
              'ffn.gate_up': ['mlp.gate_proj', 'mlp.up_proj'], 'ffn.down': ['mlp.down_proj']}
# keys of XmodelConfig and of every config.json
SHAPE = {'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads',
         'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size', 'n_ffn': 'intermediate_size',
         'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings',
         'norm_eps': 'rms_norm_eps'}


# --------------------------------------------------------------------------------------------------
# The same network in both configurations

def hf_tensors(c):
    """For each of Llama's tensors (our parameter that holds it, its name, rows there, shape)."""
    with torch.device('meta'):
        model = Xmodel(c)
    found = []
    for ours, p in model.named_parameters():
        module, _, leaf = ours.rpartition('.')
        if module.startswith('blocks.'):
            _, n, inner = module.split('.', 2)
            theirs = [f'model.layers.{n}.{name}' for name in IN_A_BLOCK[inner]]
        else:
            theirs = MODULES[module]
        first = 0
        for name, rows in zip(theirs, getattr(model.get_submodule(module), 'parts', p.shape[:1])):
            found.append((ours, f'{name}.{leaf}', slice(first, first + rows),
                          (rows, *p.shape[1:])))
            first += rows
    return found


def hf_config(c, keys='granite'):
    """The config.json, a dict, with which Llama's tensors compute what Xmodel(c) computes.

    keys: 'granite', or 'xmodel', which the authors' own class reads; ValueError if it cannot.
    """
    factor = {role: rule.multiplier for role, rule in mup_table(c).items()}
    config = {theirs: getattr(c, ours) for ours, theirs in SHAPE.items()} | {
        'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'attention_dropout': 0.0,
        'tie_word_embeddings': True, 'use_cache': True, 'initializer_range': c.init_std,
        'rope_theta': c.rope_theta, 'rope_scaling': None,
        'bos_token_id': BOS_ID, 'eos_token_id': EOS_ID, 'pad_token_id': PAD_ID}
    if keys == 'granite':
        return config | {
            'architectures': ['GraniteForCausalLM'], 'model_type': 'granite',
            # since version 5 transformers reads this in place of rope_theta
            'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},
            'embedding_multiplier': factor['embedding'],
            'attention_multiplier': factor['attention'],
            'residual_multiplier': factor['branch_out'], 'logits_scaling': 1 / factor['logits']}
    if c.mup_rules == 'sp' or c.mup_break or c.attention_scale != 1:
        raise ValueError('format=xmodel has no keys for mup_rules=sp, mup_break or attention_scale')
    return config | {
        'architectures': ['XmodelForCausalLM'], 'model_type': 'xmodel', 'use_mup': True,
        'mup_input_scale': c.input_scale, 'mup_output_scale': c.output_scale,
        'mup_attention_residual_scale': c.residual_scale,
        'mup_ffn_residual_scale': c.residual_scale,
        'mup_base_width': c.mup_base_width, 'mup_width_multiplier': c.n_embd / c.mup_base_width}


def our_config(config):
    """The XmodelConfig of a config.json of Granite, Xmodel or Llama.

    ValueError names the key of what our network does not have.
    """
    def number(key, default=None, kind=float):
        value = default if config.get(key) is None else config[key]
        if type(value) not in (int, float) or not 0 < value < 2**31 or value != kind(value):
            what = 'a number' if kind is float else 'a whole number'
            raise ValueError(f'{key} is {repr(value)[:40]}, which should be {what} above 0 '
                             'and below 2^31')
        return kind(value)

    model_type = config.get('model_type')
    if model_type not in ('granite', 'xmodel', 'llama'):
        raise ValueError(f'model_type is {model_type!r}; granite, xmodel and llama can be read')
    for key, default, right in (
            ('hidden_act', 'silu', 'silu'), ('attention_bias', False, False),
            ('mlp_bias', False, False),
            # Llama is untied unless its config says otherwise
            ('tie_word_embeddings', model_type == 'xmodel', True)):
        if config.get(key, default) != right:
            raise ValueError(f'{key} is {config.get(key, default)!r}; our network has {right!r}')
    for key in ('rope_parameters', 'rope_scaling'):                # by version 5, and before
        rope = config.get(key) or {}
        if rope.get('rope_type', rope.get('type', 'default')) != 'default' or any(
                isinstance(value, dict) for value in rope.values()):
            raise ValueError(f'{key} is {rope}; our network has plain RoPE')
        if 'rope_theta' in rope:
            config = config | {'rope_theta': rope['rope_theta']}
    default = {'num_key_value_heads': config.get('num_attention_heads')}
    shape = {ours: number(theirs, default.get(theirs), float if ours == 'norm_eps' else int)
             for ours, theirs in SHAPE.items()} | {'rope_theta': number('rope_theta', 10_000.0)}
    L, C = shape['n_layer'], shape['n_embd']
    hd = C / shape['n_head']
    if number('head_dim', hd) != hd:
        raise ValueError(f'head_dim is {config["head_dim"]}; our heads have '
                         f'hidden_size / num_attention_heads = {hd:g}')
    if model_type == 'xmodel' and config.get('use_mup'):
        attention, ffn = (number(f'mup_{part}_residual_scale', 1.4)
                          for part in ('attention', 'ffn'))
        if attention != ffn:
            raise ValueError(f'mup_attention_residual_scale is {attention} and '
                             f'mup_ffn_residual_scale {ffn}; our branches have the same')
        return XmodelConfig(**shape, mup_rules='authors', residual_scale=attention,
                            input_scale=number('mup_input_scale', 12.0),
                            output_scale=number('mup_output_scale', 1.0),
                            mup_base_width=number('mup_base_width', 256, int))
    # mup_table solved for the scales; a Llama's factors are 1, but for that of q·k
    embedding, attention, branch, divisor = (
        number(key, 1.0) if model_type == 'granite' else default for key, default in (
            ('embedding_multiplier', 1.0), ('attention_multiplier', 1 / math.sqrt(hd)),
            ('residual_multiplier', 1.0), ('logits_scaling', 1.0)))
    return XmodelConfig(**shape, input_scale=embedding, attention_scale=attention * hd,
                        residual_scale=branch * math.sqrt(L),
                        output_scale=C / XmodelConfig.mup_base_width / divisor)


# --------------------------------------------------------------------------------------------------
# Out

@contextmanager
def new_path(path):
    """Where to make a file or folder; it becomes `path` at the end: whole, or not at all."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def tensors_of(state, c):
    """(Llama's name, tensor) of a state dict, one by one; ValueError if not finite in dtype."""
    for ours, theirs, rows, _ in tqdm(hf_tensors(c), unit='tensor', disable=None):
        t = state[ours][rows]
        kind = DTYPES[dtype][0] or torch.float16                   # q8_0 has scales in fp16
        if not t.to(kind).isfinite().all():
            raise ValueError(f'{theirs} is not finite in {dtype}')
        yield theirs, t


def write_weights(folder, state, c, shard_bytes):
    """Write the tensors of a state dict as model.safetensors, or as shards and their index."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    kind = DTYPES[dtype][0]
    files, size, total = [[]], 0, 0                                # names of tensors in each file
    for _, name, _, shape in hf_tensors(c):
        bytes_ = math.prod(shape) * kind.itemsize
        if files[-1] and size + bytes_ > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size, total = size + bytes_, total + bytes_
    index, tensors = {}, tensors_of(state, c)
    for n, names in enumerate(files, 1):
        file = f'model-{n:05}-of-{len(files):05}' if files[1:] else 'model'
        try:
            save_file({name: next(tensors)[1].to(kind, copy=True) for name in names},
                      folder / f'{file}.safetensors', {'format': 'pt'})
        except SafetensorError as e:                               # a full disk, say
            raise ValueError(f'{folder}: {e}') from None
        shutil.copymode(folder / 'config.json', folder / f'{file}.safetensors')     # it made 0600
        index |= dict.fromkeys(names, f'{file}.safetensors')
    if files[1:]:
        write_json(folder / 'model.safetensors.index.json',
                   {'metadata': {'total_size': total}, 'weight_map': index})


def model_card(about, run):
    """README.md of an exported model: what it is, its scores, and how it was trained."""
    c, last = about['config'], {}
    local = ('data_dir', 'out_dir', 'init_from', 'reference', 'sources')
    with torch.device('meta'):
        n = Xmodel(c).num_params()
    what = (f'{n:,} parameters, {c.n_layer} layers of width {c.n_embd}, vocabulary '
            f'{c.vocab_size:,}, after {about["step"]:,} steps, {about["tokens"]:,} tokens. '
            'Written by nano-xmodel, after Xmodel-2.5 (arXiv 2511.19496).')
    lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', '---', '',
             f'# {run.name}', '', what, '', '```python', 'from transformers import pipeline',
             f"write = pipeline('text-generation', '{run.name}')            # this folder",
             "print(write('Once', max_new_tokens=50, do_sample=True, temperature=0.8, top_p=0.95))",
             '```', '']
    log = run / 'log.jsonl'
    for line in log.read_text(encoding='utf-8').splitlines() if log.exists() else ():
        with suppress(ValueError, KeyError, TypeError):            # a line may be cut off by a kill
            entry = json.loads(line)
            last = entry if entry['val_losses'] and entry['step'] < about['step'] else last
    if last:
        lines += [f'After {last["step"] + 1:,} steps:', '',
                  '| validation set | loss (nats a token) |', '| --- | --- |',
                  *(f'| {name} | {loss:.4f} |' for name, loss in last['val_losses'].items()), '']
    scores = Path(about['path']).with_suffix('.eval.md')           # eval.py's
    lines += [scores.read_text(encoding='utf-8')] if scores.exists() else []
    knobs = {k: v for k, v in (about['knobs'] or asdict(c)).items() if k not in local}
    return '\n'.join([*lines, '```json', json.dumps(knobs, indent=1), '```', ''])


def checkpoint_with_our_tokenizer(path):
    """read_checkpoint, and the tokenizer.json to go with it; ValueError if it has its own."""
    about = read_checkpoint(path)
    if (own := Path(about['path']).with_name('tokenizer.json')).exists():
        raise ValueError(f'{own}: with its own tokenizer a model is best taken from where it was '
                         'imported; those of our tokenizer are written')
    return about, tokenizer_json(about['config'].vocab_size)


def export(checkpoint, target):
    """Write a checkpoint as a folder of Hugging Face's. ValueError in one line."""
    about, tokens = checkpoint_with_our_tokenizer(checkpoint)
    c, path = about['config'], Path(about['path']).resolve()
    config = hf_config(c, format) | {'dtype': str(DTYPES[dtype][0]).removeprefix('torch.')}
    name = {t['id']: t['content'] for t in tokens['added_tokens']}
    special = {f'{kind}_token': name[i]
               for kind, i in (('bos', BOS_ID), ('eos', EOS_ID), ('pad', PAD_ID))}
    with new_path(target) as folder:
        folder.mkdir()
        write_json(folder / 'config.json', config)
        write_json(folder / 'generation_config.json', {
            key: config[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')})
        write_json(folder / 'tokenizer.json', tokens)
        write_json(folder / 'special_tokens_map.json', special)
        write_json(folder / 'tokenizer_config.json', special | {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size,
            'add_bos_token': False, 'clean_up_tokenization_spaces': False,
            'padding_side': 'left',                                # as many prompts at a time want
            'chat_template': CHAT_TEMPLATE})
        (folder / 'README.md').write_text(model_card(about, path.parent), encoding='utf-8')
        write_weights(folder, about['model'], c, shard_gb * 1e9)
    print(f'{target}: {path}, step {about["step"]}, as {config["architectures"][0]} in {dtype}')


def write_gguf(checkpoint, target):
    """Write a checkpoint as one file for llama.cpp, in which our network is 'granite'.

    Its own converter knows a tokenizer by the ids of a test text, which a cut vocabulary does not
    give; so the name, deepseek-v3, is written here. ValueError in one line.
    """
    import gguf
    about, tokens = checkpoint_with_our_tokenizer(checkpoint)
    c, path = about['config'], Path(about['path']).resolve()
    if dtype == 'q8_0' and (c.n_embd % 32 or c.n_ffn % 32):
        raise ValueError('dtype=q8_0 wants n_embd and n_ffn to be multiples of 32')
    _, kind, file_type = DTYPES[dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE, c.n_layer)
    config = hf_config(c)
    with new_path(target) as temporary:
        file = gguf.GGUFWriter(temporary, 'granite')
        file.add_name(path.parent.name)
        file.add_file_type(gguf.LlamaFileType[file_type])
        file.add_quantization_version(gguf.GGML_QUANT_VERSION)
        file.add_block_count(c.n_layer)
        file.add_context_length(c.block_size)
        file.add_embedding_length(c.n_embd)
        file.add_feed_forward_length(c.n_ffn)
        file.add_head_count(c.n_head)
        file.add_head_count_kv(c.n_kv_head)
        file.add_layer_norm_rms_eps(c.norm_eps)
        file.add_rope_freq_base(c.rope_theta)
        file.add_rope_dimension_count(c.hd)
        file.add_vocab_size(c.vocab_size)
        file.add_embedding_scale(config['embedding_multiplier'])
        file.add_attention_scale(config['attention_multiplier'])
        file.add_residual_scale(config['residual_multiplier'])
        file.add_logit_scale(config['logits_scaling'])
        file.add_tokenizer_model('gpt2')
        file.add_tokenizer_pre('deepseek-v3')
        text = {i: token for token, i in tokens['model']['vocab'].items()}
        kinds = dict.fromkeys(text, gguf.TokenType.NORMAL)
        for t in tokens['added_tokens']:
            text[t['id']] = t['content']
            # not special: text, in which it is found first, as the tokens around tool calls
            kinds[t['id']] = gguf.TokenType.CONTROL if t['special'] else gguf.TokenType.USER_DEFINED
        ids = range(c.vocab_size)                                  # the last ones may be padding
        file.add_token_list([text.get(i, f'[PAD{i}]') for i in ids])
        file.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in ids])
        file.add_token_merges(tokens['model']['merges'])
        file.add_bos_token_id(BOS_ID)
        file.add_eos_token_id(EOS_ID)
        file.add_pad_token_id(PAD_ID)
        file.add_add_bos_token(False)
        file.add_chat_template(CHAT_TEMPLATE)
        for theirs, t in tensors_of(about['model'], c):
            if theirs.endswith(('q_proj.weight', 'k_proj.weight')):
                # llama.cpp rotates neighbours, we (and Llama's tensors) channels i and i + hd/2
                t = t.view(-1, 2, c.hd // 2, c.n_embd).transpose(1, 2).reshape(t.shape)
            want = gguf.GGMLQuantizationType[kind if t.dim() == 2 else 'F32']    # norms stay exact
            file.add_tensor(names.get_name(theirs, ('.weight',)),
                            gguf.quants.quantize(t.float().contiguous().numpy(), want),
                            raw_dtype=want)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
    print(f'{target}: {about["path"]}, step {about["step"]}, in {dtype}; llama-cli -m {target}')


# --------------------------------------------------------------------------------------------------
# In

def read_json(path):
    """The object in a JSON file; ValueError names the file."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except OSError as e:
        raise ValueError(f'{path}: {e.strerror}') from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: {e}') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path} should hold an object')  # noqa: TRY004
    return content


def read_weights(folder):
    """{name: function that reads the tensor} of the weight files of a folder."""
    from safetensors import safe_open
    files = sorted(folder.glob('*.safetensors')) or sorted(folder.glob('pytorch_model*.bin'))
    if not files:
        raise ValueError(f'{folder} holds no weights (*.safetensors, pytorch_model*.bin)')
    found = {}
    for file in files:
        try:
            if file.suffix == '.bin':
                tensors = torch.load(file, map_location='cpu', weights_only=True)
                here = {name: t.clone for name, t in tensors.items()}
            else:
                f = safe_open(file, 'pt')
                here = {name: partial(f.get_tensor, name) for name in f.keys()}  # noqa: SIM118
        except Exception as e:  # noqa: BLE001                     (both raise many kinds)
            raise ValueError(f'{file} is damaged, or no file of weights '
                             f'({type(e).__name__})') from None
        if twice := found.keys() & here.keys():
            raise ValueError(f'{file} has {min(twice)}, as another file of the folder has')
        found |= here
    return found


def own_tokenizer(folder, vocab_size):
    """The tokenizer.json of a folder if it is not ours, else None."""
    file = folder / 'tokenizer.json'
    if not file.exists():
        if (folder / 'tokenizer.model').exists():
            raise ValueError(f'{folder} has a tokenizer.model alone; a tokenizer.json is wanted')
        return None
    model = read_json(file).get('model')
    ours = SMALLEST <= vocab_size <= PADDED and tokenizer_json(vocab_size)['model']['vocab']
    if isinstance(model, dict) and model.get('vocab') == ours:
        return None
    OtherTokenizer(file, vocab_size)                               # which raises what is wrong
    return file


def from_huggingface(folder, target):
    """Write a folder of Hugging Face's as the run folder target: step_0.pt, and shape.py."""
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder; one with config.json and weights is wanted')
    config = read_json(folder / 'config.json')
    try:
        c = our_config(config)
    except (ValueError, AttributeError, TypeError, OverflowError) as e:
        raise ValueError(f'{folder}/config.json: {e}') from None
    own = own_tokenizer(folder, c.vocab_size)
    found, state = read_weights(folder), {}
    theirs = hf_tensors(c)
    wanted = {name for _, name, _, _ in theirs}
    if missing := wanted - found.keys():
        raise ValueError(f'{folder} lacks the tensor {min(missing)}')
    for name in sorted(found.keys() - wanted):
        if name == 'lm_head.weight':
            if not torch.equal(found[name](), found['model.embed_tokens.weight']()):
                raise ValueError(f'{folder}: lm_head.weight differs from '
                                 'model.embed_tokens.weight; our network has one for both')
        elif not name.endswith('rotary_emb.inv_freq'):             # which older Llamas stored
            raise ValueError(f'{folder}: our network has no tensor {name}')
    with torch.device('meta'):
        shapes = {name: p.shape for name, p in Xmodel(c).named_parameters()}
    for ours, name, rows, shape in tqdm(theirs, unit='tensor', disable=None):
        t = found[name]()
        if tuple(t.shape) != shape:
            raise ValueError(f'{folder}: {name} is {tuple(t.shape)}, by config.json {shape}')
        if ours not in state:
            state[ours] = torch.empty(shapes[ours])
        state[ours][rows] = t
    about = {'config': asdict(c), 'model': state}
    if own:                                                        # ours has BOS_ID and EOS_ID
        there = folder / 'generation_config.json'
        ends = (read_json(there) if there.exists() else {}).get('eos_token_id',
                                                                config.get('eos_token_id'))
        about['eos_ids'] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        about['bos_id'] = config.get('bos_token_id')
        for i in (*about['eos_ids'], *([] if about['bos_id'] is None else [about['bos_id']])):
            if type(i) is not int or not 0 <= i < c.vocab_size:
                raise ValueError(f'{folder}: {i!r} is no id of a token that begins or ends a text')
    with new_path(target) as run:
        run.mkdir()
        replace_file(run / 'step_0.pt', lambda f: torch.save(about, f))
        (run / 'shape.py').write_text(                             # a config file for train.py
            '# The forward pass is the imported one. Which learning rates suit it is not known:\n'
            '# mup_rules, mup_base_width and init_std are what training takes them to be.\n'
            + ''.join(f'{k} = {v!r}\n' for k, v in asdict(c).items() if k != 'block_size'))
        if own:
            shutil.copy(own, run)
    print(f'{target}/step_0.pt: {sum(t.numel() for t in state.values()):,} parameters, '
          + ('with a tokenizer of its own' if own else "with Xmodel's tokenizer"
             + ('' if (folder / 'tokenizer.json').exists() else ', as none came with it')))


def main():
    if not source or not target:
        fail('two paths are wanted: python export.py out/RUN NEW, or --from_hf FOLDER out/NEW')
    if not shard_gb > 0:
        fail(f'shard_gb={shard_gb} should be above 0')
    if from_hf and (dtype != 'fp32' or format != 'granite'):
        fail('--from_hf takes weights as they are: without --format and --dtype')
    if dtype == 'q8_0' and format != 'gguf':
        fail(f'dtype=q8_0 is for format=gguf, not for {format}')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))       # so that nothing half-made stays
    try:
        if Path(target).exists():
            fail(f'{target} exists already; name a new one')
        if from_hf:
            from_huggingface(Path(source), Path(target))
        elif format == 'gguf':
            write_gguf(source, Path(target))
        else:
            export(source, Path(target))
    except ValueError as e:
        fail(e)
    except ModuleNotFoundError as e:
        package = e.name.partition('.')[0]
        fail(f'{package} is missing: pip install {package}')
    except OSError as e:
        fail(f'{target}: {e.strerror}')


if __name__ == '__main__':
    configure(globals(), positional=['source', 'target'])
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('export.py: stopped; nothing was written')
