"""Weights out to Hugging Face's format and GGUF, and in from Hugging Face's.

    python export.py out/proxy20m hf/proxy20m                   # for transformers, vLLM, lm-eval
    python export.py out/xmodel25 hf/xmodel25 --format=xmodel --dtype=bf16      # as the authors do
    python export.py out/proxy20m proxy20m.gguf --format=gguf   # llama.cpp, Ollama, LM Studio
    python export.py --from_hf hf/proxy20m out/imported         # back in; or anyone's Granite,
                                                                # Xmodel-2.5 or Llama, if tied

µP needs four constants in the forward pass: factors of the embedding, of q·k, of the residual
branches and of the logits. IBM's Granite 3 (transformers' GraniteForCausalLM) is a Llama with just
these four, so what is written here runs without any code of ours. In the other direction, a Granite
with any factors is an Xmodel with other scales; and so is a Llama, whose factors are 1 except for
q·k / sqrt(hd). µP's rules for init and learning rates have no keys in Granite's config: the file
shape.py, which is written beside an imported checkpoint, says what was assumed.
"""
import errno
import itertools
import json
import math
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import read_checkpoint, replace_file
from configurator import configure, fail
from model import Xmodel, XmodelConfig, mup_table
from processes import STOPPED, signals_as_ctrl_c, temporary_folder
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

# the dtype in which weights have to be finite; q8_0 has its scales in fp16
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16,
          'q8_0': torch.float16}
# our module: the modules of Llama that it fuses, in the order of its rows
MODULES = {'embed': ['model.embed_tokens'], 'norm': ['model.norm']}
IN_A_BLOCK = {'norm1': ['input_layernorm'], 'norm2': ['post_attention_layernorm'],
              'attn.qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
              'attn.out': ['self_attn.o_proj'],
              'ffn.gate_up': ['mlp.gate_proj', 'mlp.up_proj'], 'ffn.down': ['mlp.down_proj']}
# key of XmodelConfig: key of config.json, in all three formats
SHAPE = {'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads',
         'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size', 'n_ffn': 'intermediate_size',
         'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings',
         'norm_eps': 'rms_norm_eps'}


# --------------------------------------------------------------------------------------------------
# The same network in both configurations

def hf_tensors(c):
    """[(our parameter, Llama's tensor, which rows of ours it is, its shape)] of Xmodel(c)."""
    with torch.device('meta'):
        model = Xmodel(c)
    tensors = []
    for ours, p in model.named_parameters():
        module, _, leaf = ours.rpartition('.')
        if module.startswith('blocks.'):
            _, n, inner = module.split('.', 2)
            names = [f'model.layers.{n}.{name}' for name in IN_A_BLOCK[inner]]
        else:
            names = MODULES[module]
        rows_of_each = getattr(model.get_submodule(module), 'parts', p.shape[:1])
        first = 0
        for name, rows in zip(names, rows_of_each):
            shape = (rows, *p.shape[1:])
            tensors.append((ours, f'{name}.{leaf}', slice(first, first + rows), shape))
            first += rows
    return tensors


def hf_config(c, keys='granite'):
    """The config.json, a dict, with which Llama's tensors compute what Xmodel(c) computes.

    keys: 'granite', or 'xmodel' for the authors' own class. ValueError if that has no keys for c.
    """
    factor = {role: rule.multiplier for role, rule in mup_table(c).items()}
    config = {theirs: getattr(c, ours) for ours, theirs in SHAPE.items()}
    config |= {
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
            'residual_multiplier': factor['branch_out'],
            'logits_scaling': 1 / factor['logits']}
    if c.mup_rules == 'sp' or c.mup_break or c.attention_scale != 1:
        raise ValueError('format=xmodel has no keys for mup_rules=sp, mup_break or attention_scale')
    return config | {
        'architectures': ['XmodelForCausalLM'], 'model_type': 'xmodel', 'use_mup': True,
        'mup_input_scale': c.input_scale, 'mup_output_scale': c.output_scale,
        'mup_attention_residual_scale': c.residual_scale,
        'mup_ffn_residual_scale': c.residual_scale,
        'mup_base_width': c.mup_base_width, 'mup_width_multiplier': c.n_embd / c.mup_base_width}


def number(config, key, default=None, kind=float):
    """config[key], or the default where it is missing or null, as a float or an int.

    ValueError if it is no such number, or not above 0 and below 2^31.
    """
    value = default if config.get(key) is None else config[key]
    if type(value) not in (int, float) or not 0 < value < 2**31 or value != kind(value):
        what = 'a number' if kind is float else 'a whole number'
        raise ValueError(f'{key} is {repr(value)[:40]}, which should be {what} above 0 '
                         'and below 2^31')
    return kind(value)


def check_architecture(config):
    """ValueError, with the key, if a config.json describes a network of another kind than ours."""
    model_type = config.get('model_type')
    if model_type not in ('granite', 'xmodel', 'llama'):
        raise ValueError(f'model_type is {model_type!r}; granite, xmodel and llama can be read')
    tied_by_default = model_type == 'xmodel'
    for key, default, ours in (
            ('hidden_act', 'silu', 'silu'), ('attention_bias', False, False),
            ('mlp_bias', False, False), ('tie_word_embeddings', tied_by_default, True)):
        value = config.get(key, default)
        if value != ours:
            raise ValueError(f'{key} is {value!r}; our network has {ours!r}')


def rope_theta_of(config):
    """The base of RoPE in a config.json; ValueError if RoPE is scaled in some way."""
    theta = config.get('rope_theta')
    for key in ('rope_parameters', 'rope_scaling'):                # of transformers 5, and before
        rope = config.get(key) or {}
        kind = rope.get('rope_type', rope.get('type', 'default'))
        differs_by_layer = any(isinstance(value, dict) for value in rope.values())
        if kind != 'default' or differs_by_layer:
            raise ValueError(f'{key} is {rope}; our network has plain RoPE')
        theta = rope.get('rope_theta', theta)
    return number({'rope_theta': theta}, 'rope_theta', 10_000.0)


def our_config(config):
    """The XmodelConfig of a config.json of Granite, Xmodel or Llama.

    ValueError names the key of what our network does not have.
    """
    check_architecture(config)
    shape = {'rope_theta': rope_theta_of(config)}
    for ours, theirs in SHAPE.items():
        default = config.get('num_attention_heads') if ours == 'n_kv_head' else None
        shape[ours] = number(config, theirs, default, float if ours == 'norm_eps' else int)
    hd = shape['n_embd'] / shape['n_head']
    if number(config, 'head_dim', hd) != hd:
        raise ValueError(f'head_dim is {config["head_dim"]}; our heads have '
                         f'hidden_size / num_attention_heads = {hd:g}')
    if config['model_type'] == 'xmodel' and config.get('use_mup'):
        return XmodelConfig(**shape, mup_rules='authors', **authors_scales(config))
    return XmodelConfig(**shape, **scales_of_factors(config, shape, hd))


def authors_scales(config):
    """The scales in the authors' own config.json."""
    attention = number(config, 'mup_attention_residual_scale', 1.4)
    ffn = number(config, 'mup_ffn_residual_scale', 1.4)
    if attention != ffn:
        raise ValueError(f'mup_attention_residual_scale is {attention} and '
                         f'mup_ffn_residual_scale {ffn}; our branches have the same')
    return {'residual_scale': attention,
            'input_scale': number(config, 'mup_input_scale', 12.0),
            'output_scale': number(config, 'mup_output_scale', 1.0),
            'mup_base_width': number(config, 'mup_base_width', 256, int)}


def scales_of_factors(config, shape, hd):
    """The scales from which model.mup_table makes a Granite's four factors, or a Llama's."""
    factor = {'embedding_multiplier': 1.0, 'attention_multiplier': 1 / math.sqrt(hd),
              'residual_multiplier': 1.0, 'logits_scaling': 1.0}
    if config['model_type'] == 'granite':
        factor = {key: number(config, key, 1.0) for key in factor}
    width_multiplier = shape['n_embd'] / XmodelConfig.mup_base_width
    return {'input_scale': factor['embedding_multiplier'],
            'attention_scale': factor['attention_multiplier'] * hd,
            'residual_scale': factor['residual_multiplier'] * math.sqrt(shape['n_layer']),
            'output_scale': width_multiplier / factor['logits_scaling']}


# --------------------------------------------------------------------------------------------------
# Out to Hugging Face's format

@contextmanager
def new_path(path):
    """Yields a temporary path to write to, which is renamed to `path` at the end.

    After an exception nothing is left, but an empty folder that `path` should have been in.
    """
    with temporary_folder(path.parent, path.name) as folder:
        yield folder / path.name
        (folder / path.name).rename(path)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def checkpoint_with_our_tokenizer(path):
    """(what read_checkpoint returns, our tokenizer.json as a dict).

    ValueError if the checkpoint has a tokenizer of its own.
    """
    about = read_checkpoint(path)
    own = Path(about['path']).with_name('tokenizer.json')
    if own.exists():
        raise ValueError(f'{own}: with its own tokenizer a model is best taken from where it was '
                         'imported; those of our tokenizer are written')
    return about, tokenizer_json(about['config'].vocab_size)


def hf_state(state, c):
    """Yields (Llama's name, tensor) of a state dict; ValueError if one is not finite in dtype."""
    for ours, theirs, rows, _ in tqdm(hf_tensors(c), unit='tensor', disable=None):
        t = state[ours][rows]
        if not t.to(DTYPES[dtype]).isfinite().all():
            raise ValueError(f'{theirs} is not finite in {dtype}')
        yield theirs, t


def plan_shards(c, shard_bytes):
    """([[name of a tensor, ...] of each file], bytes of all): files of at most shard_bytes.

    A tensor that is larger has a file of its own.
    """
    shards, shard_size, total = [[]], 0, 0
    for _, name, _, shape in hf_tensors(c):
        n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        if shards[-1] and shard_size + n_bytes > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += n_bytes
        total += n_bytes
    return shards, total


def write_weights(folder, state, c, shard_bytes):
    """Write the tensors of a state dict as model.safetensors, or as shards and their index."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    shards, total_bytes = plan_shards(c, shard_bytes)
    tensors = hf_state(state, c)
    index = {}
    for n, names in enumerate(shards, 1):
        file = 'model.safetensors'
        if len(shards) > 1:
            file = f'model-{n:05}-of-{len(shards):05}.safetensors'
        # copies: safetensors refuses tensors that share memory, as rows of a fused weight do
        shard = {name: t.to(DTYPES[dtype], copy=True)
                 for name, t in itertools.islice(tensors, len(names))}
        try:
            save_file(shard, folder / file, {'format': 'pt'})
        except SafetensorError as e:                               # a full disk, say
            raise OSError(errno.EIO, f'{e}') from None
        # safetensors lets only the owner read its files
        shutil.copymode(folder / 'config.json', folder / file)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / 'model.safetensors.index.json',
                   {'metadata': {'total_size': total_bytes}, 'weight_map': index})


def last_validation(log, step):
    """The last entry of a log before `step` that has validation losses, or None."""
    last = None
    if not log.exists():
        return None
    for line in log.read_text(encoding='utf-8').splitlines():
        with suppress(ValueError, KeyError, TypeError):            # a line may be cut off by a kill
            entry = json.loads(line)
            if entry['val_losses'] and entry['step'] < step:
                last = entry
    return last


def model_card(about, run):
    """README.md of an exported model: what it is, its scores, and how it was trained."""
    c = about['config']
    with torch.device('meta'):
        n = Xmodel(c).num_params()
    description = (f'{n:,} parameters, {c.n_layer} layers of width {c.n_embd}, vocabulary '
                   f'{c.vocab_size:,}, after {about["step"]:,} steps, {about["tokens"]:,} tokens. '
                   'Written by nano-xmodel, after Xmodel-2.5 (arXiv 2511.19496).')
    lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', '---', '',
             f'# {run.name}', '', description, '',
             '```python', 'from transformers import pipeline',
             f"write = pipeline('text-generation', '{run.name}')            # this folder",
             "print(write('Once', max_new_tokens=50, do_sample=True, temperature=0.8, top_p=0.95))",
             '```', '']
    last = last_validation(run / 'log.jsonl', about['step'])
    if last:
        lines += [f'After {last["step"] + 1:,} steps:', '',
                  '| validation set | loss (nats a token) |', '| --- | --- |']
        lines += [f'| {name} | {loss:.4f} |' for name, loss in last['val_losses'].items()]
        lines.append('')
    scores = Path(about['path']).with_suffix('.eval.md')           # written by eval.py
    if scores.exists():
        lines.append(scores.read_text(encoding='utf-8'))
    local = ('data_dir', 'out_dir', 'init_from', 'reference', 'sources')
    knobs = about['knobs'] or asdict(c)
    knobs = {key: value for key, value in knobs.items() if key not in local}
    lines += ['```json', json.dumps(knobs, indent=1), '```', '']
    return '\n'.join(lines)


def export(checkpoint, target):
    """Write a checkpoint as a folder in Hugging Face's format. ValueError in one line."""
    about, tokenizer = checkpoint_with_our_tokenizer(checkpoint)
    c, path = about['config'], Path(about['path']).resolve()
    config = hf_config(c, format)
    config['dtype'] = str(DTYPES[dtype]).removeprefix('torch.')
    ends = {key: config[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    text_of = {token['id']: token['content'] for token in tokenizer['added_tokens']}
    special = {'bos_token': text_of[BOS_ID], 'eos_token': text_of[EOS_ID],
               'pad_token': text_of[PAD_ID]}
    tokenizer_config = special | {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size,
        'add_bos_token': False, 'clean_up_tokenization_spaces': False,
        'padding_side': 'left',                                    # for batches of prompts
        'chat_template': CHAT_TEMPLATE}
    with new_path(target) as folder:
        folder.mkdir()
        write_json(folder / 'config.json', config)
        write_json(folder / 'generation_config.json', ends)
        write_json(folder / 'tokenizer.json', tokenizer)
        write_json(folder / 'special_tokens_map.json', special)
        write_json(folder / 'tokenizer_config.json', tokenizer_config)
        (folder / 'README.md').write_text(model_card(about, path.parent), encoding='utf-8')
        write_weights(folder, about['model'], c, shard_gb * 1e9)
    print(f'{target}: {path}, step {about["step"]}, as {config["architectures"][0]} in {dtype}')


# --------------------------------------------------------------------------------------------------
# Out to GGUF: one file for llama.cpp, which calls our network 'granite'

# dtype: (GGUF's type of a matrix, GGUF's type of a file)
GGUF_TYPES = {'fp32': ('F32', 'ALL_F32'), 'fp16': ('F16', 'MOSTLY_F16'),
              'bf16': ('BF16', 'MOSTLY_BF16'), 'q8_0': ('Q8_0', 'MOSTLY_Q8_0')}


def add_network(file, c):
    """The shape of the network and its four factors, in a GGUFWriter."""
    config = hf_config(c)
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


def add_tokenizer(file, tokenizer, vocab_size):
    """The tokenizer of a tokenizer.json, in a GGUFWriter.

    llama.cpp's own converter recognises a pre-tokenizer by the ids of a test text. With a cut
    vocabulary those differ, so its name, deepseek-v3, is written here.
    """
    from gguf import TokenType
    text_of = {i: token for token, i in tokenizer['model']['vocab'].items()}
    type_of = dict.fromkeys(text_of, TokenType.NORMAL)
    for token in tokenizer['added_tokens']:
        text_of[token['id']] = token['content']
        # USER_DEFINED is found in text, before anything else: the tokens around tool calls, say
        type_of[token['id']] = TokenType.CONTROL if token['special'] else TokenType.USER_DEFINED
    ids = range(vocab_size)                                        # the last ones may be padding
    file.add_tokenizer_model('gpt2')
    file.add_tokenizer_pre('deepseek-v3')
    file.add_token_list([text_of.get(i, f'[PAD{i}]') for i in ids])
    file.add_token_types([type_of.get(i, TokenType.UNUSED) for i in ids])
    file.add_token_merges(tokenizer['model']['merges'])
    file.add_bos_token_id(BOS_ID)
    file.add_eos_token_id(EOS_ID)
    file.add_pad_token_id(PAD_ID)
    file.add_add_bos_token(False)
    file.add_chat_template(CHAT_TEMPLATE)


def add_weights(file, state, c):
    """The tensors of a state dict, in a GGUFWriter."""
    import gguf
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE, c.n_layer)
    matrix_type, _ = GGUF_TYPES[dtype]
    for name, t in hf_state(state, c):
        if name.endswith(('q_proj.weight', 'k_proj.weight')):
            # RoPE: llama.cpp rotates neighbours, we (and Llama's tensors) channels i and i + hd/2
            t = t.view(-1, 2, c.hd // 2, c.n_embd).transpose(1, 2).reshape(t.shape)
        gguf_type = gguf.GGMLQuantizationType[matrix_type if t.dim() == 2 else 'F32']
        values = gguf.quants.quantize(t.float().contiguous().numpy(), gguf_type)
        file.add_tensor(names.get_name(name, ('.weight',)), values, raw_dtype=gguf_type)


def write_gguf(checkpoint, target):
    """Write a checkpoint as a GGUF file. ValueError in one line."""
    import gguf
    about, tokenizer = checkpoint_with_our_tokenizer(checkpoint)
    c, path = about['config'], Path(about['path']).resolve()
    if dtype == 'q8_0' and (c.n_embd % 32 or c.n_ffn % 32):
        raise ValueError('dtype=q8_0 wants n_embd and n_ffn to be multiples of 32')
    _, file_type = GGUF_TYPES[dtype]
    with new_path(target) as temporary:
        file = gguf.GGUFWriter(temporary, 'granite')
        file.add_name(path.parent.name)
        file.add_file_type(gguf.LlamaFileType[file_type])
        file.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_network(file, c)
        add_tokenizer(file, tokenizer, c.vocab_size)
        add_weights(file, about['model'], c)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
    print(f'{target}: {about["path"]}, step {about["step"]}, in {dtype}; llama-cli -m {target}')


# --------------------------------------------------------------------------------------------------
# In from Hugging Face's format

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
    readers = {}
    for file in files:
        try:
            if file.suffix == '.bin':
                tensors = torch.load(file, map_location='cpu', weights_only=True)
                of_file = {name: t.clone for name, t in tensors.items()}
            else:
                f = safe_open(file, 'pt')
                of_file = {name: partial(f.get_tensor, name) for name in f.keys()}  # noqa: SIM118
        except Exception as e:  # noqa: BLE001                     (both raise many kinds)
            raise ValueError(f'{file} is damaged, or no file of weights '
                             f'({type(e).__name__})') from None
        twice = readers.keys() & of_file.keys()
        if twice:
            raise ValueError(f'{file} has {min(twice)}, as another file of the folder has')
        readers |= of_file
    return readers


def own_tokenizer(folder, vocab_size):
    """The tokenizer.json of a folder if it is not ours, else None."""
    file = folder / 'tokenizer.json'
    if not file.exists():
        if (folder / 'tokenizer.model').exists():
            raise ValueError(f'{folder} has a tokenizer.model alone; a tokenizer.json is wanted')
        return None
    model = read_json(file).get('model')
    if isinstance(model, dict) and SMALLEST <= vocab_size <= PADDED:
        ours = tokenizer_json(vocab_size)['model']['vocab']
        if model.get('vocab') == ours:
            return None
    OtherTokenizer(file, vocab_size)                               # raises ValueError if unreadable
    return file


def check_tensors(folder, readers, wanted):
    """ValueError if a folder's tensors are not those wanted, but for what Llama may add to them."""
    missing = wanted - readers.keys()
    if missing:
        raise ValueError(f'{folder} lacks the tensor {min(missing)}')
    for name in sorted(readers.keys() - wanted):
        if name == 'lm_head.weight':
            if not torch.equal(readers[name](), readers['model.embed_tokens.weight']()):
                raise ValueError(f'{folder}: lm_head.weight differs from '
                                 'model.embed_tokens.weight; our network has one for both')
        elif not name.endswith('rotary_emb.inv_freq'):             # which older Llamas stored
            raise ValueError(f'{folder}: our network has no tensor {name}')


def read_state(folder, c):
    """The state dict of Xmodel(c), in fp32, from the weight files of a folder."""
    readers = read_weights(folder)
    tensors = hf_tensors(c)
    check_tensors(folder, readers, {name for _, name, _, _ in tensors})
    with torch.device('meta'):
        shapes = {name: p.shape for name, p in Xmodel(c).named_parameters()}
    state = {}
    for ours, name, rows, shape in tqdm(tensors, unit='tensor', disable=None):
        t = readers[name]()
        if tuple(t.shape) != shape:
            raise ValueError(f'{folder}: {name} is {tuple(t.shape)}, by config.json {shape}')
        if ours not in state:
            state[ours] = torch.empty(shapes[ours])
        state[ours][rows] = t
    return state


def ends_of_text(folder, config, vocab_size):
    """{'eos_ids': ids that end a text, 'bos_id': the id that begins one, or None} of a model."""
    generation_config = folder / 'generation_config.json'
    eos = config.get('eos_token_id')
    if generation_config.exists():
        eos = read_json(generation_config).get('eos_token_id', eos)
    if eos is None:
        eos = []
    elif not isinstance(eos, list):
        eos = [eos]
    bos = config.get('bos_token_id')
    ids = list(eos)
    if bos is not None:
        ids.append(bos)
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(f'{folder}: {i!r} is no id of a token that begins or ends a text')
    return {'eos_ids': eos, 'bos_id': bos}


def from_huggingface(folder, target):
    """Write a folder in Hugging Face's format as the run folder target: step_0.pt, and shape.py."""
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder; one with config.json and weights is wanted')
    config = read_json(folder / 'config.json')
    try:
        c = our_config(config)
    except (ValueError, AttributeError, TypeError, OverflowError) as e:
        raise ValueError(f'{folder}/config.json: {e}') from None
    tokenizer = own_tokenizer(folder, c.vocab_size)
    state = read_state(folder, c)
    checkpoint = {'config': asdict(c), 'model': state}
    if tokenizer:                                      # with ours, BOS_ID and EOS_ID are the ends
        checkpoint |= ends_of_text(folder, config, c.vocab_size)
    shape = ('# The forward pass is the imported one. Which learning rates suit it is not known:\n'
             '# mup_rules, mup_base_width and init_std are what training takes them to be.\n')
    for key, value in asdict(c).items():
        if key != 'block_size':
            shape += f'{key} = {value!r}\n'
    with new_path(target) as run:
        run.mkdir()
        replace_file(run / 'step_0.pt', lambda f: torch.save(checkpoint, f))
        (run / 'shape.py').write_text(shape)                       # a config file for train.py
        if tokenizer:
            shutil.copy(tokenizer, run)
    if tokenizer:
        which = 'with a tokenizer of its own'
    elif (folder / 'tokenizer.json').exists():
        which = "with Xmodel's tokenizer"
    else:
        which = "with Xmodel's tokenizer, as none came with it"
    n = sum(t.numel() for t in state.values())
    print(f'{target}/step_0.pt: {n:,} parameters, {which}')


# --------------------------------------------------------------------------------------------------
# The script

def main():
    if not source or not target:
        fail('two paths are wanted: python export.py out/RUN NEW, or --from_hf FOLDER out/NEW')
    if not shard_gb > 0:
        fail(f'shard_gb={shard_gb} should be above 0')
    if from_hf and (dtype != 'fp32' or format != 'granite'):
        fail('--from_hf takes weights as they are: without --format and --dtype')
    if dtype == 'q8_0' and format != 'gguf':
        fail(f'dtype=q8_0 is for format=gguf, not for {format}')
    if Path(target).suffix == '.gguf' and format != 'gguf':
        fail(f'{target}: with --format=gguf this file is written; format={format} is a folder')
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
        fail(f'{target}: {e.strerror or e}')


if __name__ == '__main__':
    configure(globals(), positional=['source', 'target'])
    try:
        with signals_as_ctrl_c():
            main()
    except KeyboardInterrupt:
        fail('stopped; nothing was written', STOPPED)
