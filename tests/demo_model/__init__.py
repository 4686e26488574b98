"""How the demo model and its data were made: `cd tests && python -m demo_model.train --output DIR`.

    scenes.py     the pictures: nine cells with coloured shapes and handwritten digits
    questions.py  the questions about a picture and their answers
    datasets.py   the three splits as PNGs and JSON lines
    processor.py  tokenizer, image processor and chat template
    train.py      the recipe; its numbers are in recipe.py, its steps in network.py, pool.py, packing.py,
                  losses.py, optimizer.py and scoring.py
    outliers.py   the function-preserving rescale that makes it as hard to quantize as a large model
    data/         the training questions, 512 of them

The model and the other questions are in qvlm_hf/demo.
"""
