"""Weights out to Hugging Face's format and in from it. Our network is transformers' Granite.

    python export.py out/proxy20m hf/proxy20m                   # for transformers, vLLM, lm-eval
    python export.py out/xmodel25 hf/xmodel25 --format=xmodel --dtype=bf16      # as the authors do
    python export.py out/proxy20m proxy20m.gguf --format=gguf   # llama.cpp, Ollama, LM Studio
    python export.py --from_hf hf/proxy20m out/imported         # back in; or anyone's Granite,
                                                                # Xmodel-2.5 or Llama, if tied

µP asks of the forward pass four constants: factors of embedding, q·k, residual branches and logits.
IBM's Granite (arXiv 2405.04324's successor, class GraniteForCausalLM) is a Llama that has just
these, so what is written here runs with no code of ours. The other way a Granite of any factors, or
a Llama (all of them 1, but for q·k / sqrt(hd)), is an Xmodel with other scales.
"""
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import read_checkpoint, read_log
from configurator import configure, fail
from model import Xmodel, XmodelConfig, mup_table
from tokenizer import BOS_ID, CHAT_TEMPLATE, EOS_ID, PAD_ID, PADDED, SMALLEST, tokenizer_json

source = ''                   # a run's folder or step_N.pt; with from_hf: Hugging Face's folder
target = ''                   # a new folder to write; with format=gguf a new file
from_hf = False               # the other way: from Hugging Face's format to a run's folder
format = 'granite'            # 'granite' | 'xmodel' | 'gguf': xmodel has the authors' config keys
dtype = 'fp32'                # 'fp32' | 'bf16' | 'fp16' | 'q8_0': of weights out; q8_0: gguf alone
shard_gb = 5.0                # weights beyond this go into several files

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
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
    """[(our parameter, Llama's name, its rows in ours: a slice, shape)] of Xmodel(c)."""
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


def hf_config(c, format='granite'):
    """The config.json, a dict, with which Llama's tensors compute what Xmodel(c) computes."""
    factor = {role: rule.multiplier for role, rule in mup_table(c).items()}
    config = {theirs: getattr(c, ours) for ours, theirs in SHAPE.items()} | {
        'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'attention_dropout': 0.0,
        'tie_word_embeddings': True, 'use_cache': True, 'initializer_range': c.init_std,
        'rope_theta': c.rope_theta, 'rope_scaling': None,
        'bos_token_id': BOS_ID, 'eos_token_id': EOS_ID, 'pad_token_id': PAD_ID}
    if format == 'granite':
        return config | {
            'architectures': ['GraniteForCausalLM'], 'model_type': 'granite',
            # since version 5 transformers reads this in place of rope_theta
            'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},
            'embedding_multiplier': factor['embedding'],
            'attention_multiplier': factor['attention'],
            'residual_multiplier': factor['branch_out'], 'logits_scaling': 1 / factor['logits']}
    if c.mup_rules == 'sp' or c.attention_scale != 1:
        raise ValueError('format=xmodel is for models of µP with attention_scale=1')
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
    kind, value = config.get('model_type'), {}
    if kind not in ('granite', 'xmodel', 'llama'):
        raise ValueError(f'model_type is {kind!r}; granite, xmodel and llama can be read')
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    for key, found, right in (
            ('hidden_act', config.get('hidden_act', 'silu'), 'silu'),
            ('attention_bias', config.get('attention_bias') or False, False),
            ('mlp_bias', config.get('mlp_bias') or False, False),
            ('rope type', rope.get('rope_type', rope.get('type', 'default')), 'default'),
            # Llama is untied unless its config says otherwise
            ('tie_word_embeddings', config.get('tie_word_embeddings', kind == 'xmodel'), True)):
        if found != right:
            raise ValueError(f'{key} is {found!r}, which our network does not have: only {right!r}')
    for ours, theirs in SHAPE.items():
        default = config.get('num_attention_heads') if ours == 'n_kv_head' else None
        value[ours] = config.get(theirs, default)
        wrong = not isinstance(value[ours], (int, float)) or isinstance(value[ours], bool)
        if wrong or (ours != 'norm_eps' and value[ours] != int(value[ours])):
            raise ValueError(f'{theirs} is {value[ours]!r}, not a number')
    value['rope_theta'] = float(rope.get('rope_theta', config.get('rope_theta', 10_000.0)))
    L, C = value['n_layer'], value['n_embd']
    hd = C / value['n_head']
    if (config.get('head_dim') or hd) != hd:
        raise ValueError(f'head_dim is {config["head_dim"]}; our heads have '
                         f'hidden_size / num_attention_heads = {hd:g}')
    if kind == 'xmodel' and config.get('use_mup'):
        attention, ffn = (config.get(f'mup_{part}_residual_scale', 1.4)
                          for part in ('attention', 'ffn'))
        if attention != ffn:
            raise ValueError(f'mup_attention_residual_scale is {attention} and '
                             f'mup_ffn_residual_scale {ffn}; our branches have the same')
        return XmodelConfig(**value, mup_rules='authors', residual_scale=attention,
                            input_scale=config.get('mup_input_scale', 12.0),
                            output_scale=config.get('mup_output_scale', 1.0),
                            mup_base_width=config.get('mup_base_width', 256))
    granite = config if kind == 'granite' else {'attention_multiplier': 1 / math.sqrt(hd)}
    return XmodelConfig(**value, input_scale=granite.get('embedding_multiplier', 1.0),
                        attention_scale=granite.get('attention_multiplier', 1.0) * hd,
                        residual_scale=granite.get('residual_multiplier', 1.0) * math.sqrt(L),
                        output_scale=C / XmodelConfig.mup_base_width
                        / granite.get('logits_scaling', 1.0))


# --------------------------------------------------------------------------------------------------
# Out

@contextmanager
def new_folder(path):
    """A folder to fill, which becomes `path` at the end: whole, or not at all."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def write_weights(folder, model, c, dtype, shard_bytes):
    """Write the tensors of a state dict as model.safetensors, or as shards and their index."""
    from safetensors.torch import save_file
    shards, sizes = [[]], [0]
    for ours, theirs, rows, shape in hf_tensors(c):
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append((ours, theirs, rows))
        sizes[-1] += size
    index = {}
    for n, shard in enumerate(tqdm(shards, unit='file', disable=None), 1):
        name = f'model-{n:05}-of-{len(shards):05}' if shards[1:] else 'model'
        name += '.safetensors'
        tensors = {theirs: model[ours][rows].to(dtype, copy=True) for ours, theirs, rows in shard}
        for theirs, t in tensors.items():
            if not t.isfinite().all():
                raise ValueError(f'{theirs} is not finite in {str(dtype)[6:]}')
        save_file(tensors, folder / name, {'format': 'pt'})
        index |= dict.fromkeys(tensors, name)
    if shards[1:]:
        write_json(folder / 'model.safetensors.index.json',
                   {'metadata': {'total_size': sum(sizes)}, 'weight_map': index})


def model_card(about, run):
    """README.md of an exported model: what it is, how it was trained, its last validation."""
    c, knobs = about['config'], about['knobs']
    with torch.device('meta'):
        n = Xmodel(c).num_params()
    what = (f'{n:,} parameters, {c.n_layer} layers of width {c.n_embd}, vocabulary '
            f'{c.vocab_size:,}, after {about["step"]:,} steps, {about["tokens"]:,} tokens. '
            'Trained with nano-xmodel, after Xmodel-2.5 (arXiv 2511.19496).')
    lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', '---', '',
             f'# {run.name}', '', what, '']
    log = [e for e in (read_log(run) if (run / 'log.jsonl').exists() else [])
           if 'val_losses' in e and e['step'] < about['step']]
    if log:
        lines += ['| validation set | loss (nats a token) |', '| --- | --- |',
                  *(f'| {name} | {loss:.4f} |' for name, loss in log[-1]['val_losses'].items()),
                  '', f'(after {log[-1]["step"] + 1:,} steps)', '']
    return '\n'.join([*lines, '```json', json.dumps(knobs or asdict(c), indent=1), '```', ''])


def export(checkpoint, target):
    """Write a checkpoint as a folder of Hugging Face's. ValueError in one line."""
    about = read_checkpoint(checkpoint)
    c, path = about['config'], Path(about['path'])
    config = hf_config(c, format) | {'dtype': str(DTYPES[dtype])[6:]}
    tokens = tokenizer_json(c.vocab_size)
    name = {t['id']: t['content'] for t in tokens['added_tokens']}
    special = {f'{kind}_token': name[i]
               for kind, i in (('bos', BOS_ID), ('eos', EOS_ID), ('pad', PAD_ID))}
    with new_folder(target) as folder:
        write_json(folder / 'config.json', config)
        write_json(folder / 'generation_config.json', {
            key: config[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')})
        write_json(folder / 'tokenizer.json', tokens)
        write_json(folder / 'special_tokens_map.json', special)
        write_json(folder / 'tokenizer_config.json', special | {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size,
            'add_bos_token': False, 'clean_up_tokenization_spaces': False,
            'chat_template': CHAT_TEMPLATE})
        (folder / 'README.md').write_text(model_card(about, path.parent), encoding='utf-8')
        write_weights(folder, about['model'], c, DTYPES[dtype], shard_gb * 1e9)
    print(f'{target}: {path}, step {about["step"]}, as {config["architectures"][0]} in {dtype}')


def write_gguf(checkpoint, target):
    """Write a checkpoint as one file for llama.cpp, in which our network is 'granite'.

    Its own converter knows a tokenizer by the ids of a test text, which a cut vocabulary does not
    give; here the name is told. ValueError in one line.
    """
    import gguf
    about = read_checkpoint(checkpoint)
    c, model, tokens = about['config'], about['model'], tokenizer_json(about['config'].vocab_size)
    kind = gguf.GGMLQuantizationType[{'fp32': 'F32', 'fp16': 'F16'}.get(dtype, dtype.upper())]
    if dtype == 'q8_0' and (c.n_embd % 32 or c.n_ffn % 32):
        raise ValueError('dtype=q8_0 wants n_embd and n_ffn to be multiples of 32')
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE, c.n_layer)
    config = hf_config(c)
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    try:
        file = gguf.GGUFWriter(temporary, 'granite')
        file.add_name(Path(about['path']).parent.name)
        file.add_file_type(gguf.LlamaFileType['ALL_F32' if dtype == 'fp32' else
                                              f'MOSTLY_{kind.name}'])
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
        for ours, theirs, rows, _ in tqdm(hf_tensors(c), unit='tensor', disable=None):
            t = model[ours][rows].float()
            if theirs.endswith(('q_proj.weight', 'k_proj.weight')):
                # llama.cpp rotates neighbours, we (and Llama's tensors) channels i and i + hd/2
                t = t.view(-1, 2, c.hd // 2, c.n_embd).transpose(1, 2).reshape(t.shape)
            want = kind if t.dim() == 2 else gguf.GGMLQuantizationType.F32       # norms stay exact
            file.add_tensor(names.get_name(theirs, ('.weight',)),
                            gguf.quants.quantize(t.contiguous().numpy(), want), raw_dtype=want)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        os.link(temporary, target)                                 # never over another file
    finally:
        temporary.unlink(missing_ok=True)
    print(f'{target}: {about["path"]}, step {about["step"]}, in {dtype}; llama-cli -m {target}')


# --------------------------------------------------------------------------------------------------
# In

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
                tensors = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
                found |= {name: t.clone for name, t in tensors.items()}
            else:
                f = safe_open(file, 'pt')
                found |= {name: partial(f.get_tensor, name) for name in f.keys()}  # noqa: SIM118
        except Exception as e:  # noqa: BLE001                     (both raise many kinds)
            raise ValueError(f'{file} is damaged, or no file of weights '
                             f'({type(e).__name__})') from None
    return found


def from_huggingface(folder, target):
    """Write a folder of Hugging Face's as the run folder target: step_0.pt, and shape.py."""
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        c = our_config(config)
    except OSError as e:
        raise ValueError(f'{folder}/config.json: {e.strerror}') from None
    except (ValueError, AttributeError) as e:
        raise ValueError(f'{folder}/config.json: {e}') from None
    found, model = read_weights(folder), {}
    theirs = hf_tensors(c)
    wanted = {name for _, name, _, _ in theirs}
    if missing := wanted - found.keys():
        raise ValueError(f'{folder} lacks the tensor {min(missing)}')
    for name in found.keys() - wanted:
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
        if ours not in model:
            model[ours] = torch.empty(shapes[ours])
        model[ours][rows] = t
    eos = config.get('eos_token_id')                               # Llama 3 has a list of them
    about = {'config': asdict(c), 'model': model,
             'eos_id': eos[0] if isinstance(eos, list) else eos}
    tokens, own = folder / 'tokenizer.json', False
    if tokens.exists():
        own = not SMALLEST <= c.vocab_size <= PADDED or \
            json.loads(tokens.read_text(encoding='utf-8'))['model']['vocab'] != \
            tokenizer_json(c.vocab_size)['model']['vocab']
    with new_folder(target) as run:
        torch.save(about, run / 'step_0.pt')
        (run / 'shape.py').write_text(                             # a config file for train.py
            f'# of {folder.name}\n' + ''.join(f'{key} = {value!r}\n' for key, value in
                                              asdict(c).items() if key != 'block_size'))
        if own:
            shutil.copy(tokens, run)
    print(f'{target}/step_0.pt: {sum(t.numel() for t in model.values()):,} parameters, '
          + ('with a tokenizer of its own' if own else "with Xmodel's tokenizer"))


def main():
    if not source or not target:
        fail('two paths are wanted: python export.py out/RUN NEW, or --from_hf FOLDER out/NEW')
    if not shard_gb > 0:
        fail(f'shard_gb={shard_gb} should be above 0')
    if Path(target).exists():
        fail(f'{target} exists already; name a new one')
    if dtype == 'q8_0' and format != 'gguf':
        fail(f'dtype=q8_0 is for format=gguf, not for {format}')
    try:
        if from_hf:
            from_huggingface(Path(source), Path(target))
        elif format == 'gguf':
            write_gguf(source, Path(target))
        else:
            export(source, Path(target))
    except ValueError as e:
        fail(e)
    except ImportError as e:
        package = e.name.partition('.')[0]
        fail(f'{package} is missing: pip install {package}')
    except OSError as e:
        fail(f'{e.filename or target}: {e.strerror}')


if __name__ == '__main__':
    configure(globals(), positional=['source', 'target'])
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('export.py: stopped; nothing was written')
