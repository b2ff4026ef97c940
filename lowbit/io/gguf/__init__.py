"""GGUF both ways: a native checkpoint as a file that llama.cpp loads, and such a file as QTensors.

    from lowbit.io.gguf.write import write
    warnings = write(open_low_bit(path), out_file, kind)   # `lowbit export DIR --to gguf[:KIND] -o FILE.gguf`

``kind`` None: every low-bit linear becomes the smallest block type that holds its values exactly (ExportError names the
first that none can hold, and the nearest format); a block type (``q4_0``, ``tq1_0``, ...): that one or ExportError;
``f32 f16 bf16``: low-bit linears are decoded into plain numbers. ``kinds()`` lists them. The file is one, atomic; its
16-bit tensors keep their dtype. ``write`` verifies the headers of the checkpoint, and reads one tensor at a time.

    from lowbit.io.gguf.read import read
    model = read(file)                                # `lowbit import FILE.gguf -o DIR`
    model.config                                      # dict for config.json, without quantization_config
    model.tensors()                                   # Iterator[(hf name, QTensor | Tensor)], one at a time
    model.companions(folder)                          # tokenizer files, chat template, card with the license
    model.warnings                                    # what the file has that is not carried over

Names are those of transformers' module tree with experts as linears of their own (:mod:`lowbit.models.graph`): a
QTensor's name ends in ``.weight`` like any other, its site is what stands before. Linears of blocks become QTensors;
embeddings, norms and biases plain tensors of the narrowest dtype that holds them exactly. Both raise only LowbitErrors:
CheckpointError for a file that is not what it claims, ExportError for what GGUF or llama.cpp cannot hold.
"""
