"""Puts what calibrate.py saved on the Hub, with its card. Needs `hf auth login` or HF_TOKEN."""

import qvlm_hf

DIRECTORY = "qvlm-w4a4"
REPOSITORY = "me/qvlm-example"  # your name, or an organization of yours

published = qvlm_hf.publish_folder(DIRECTORY, REPOSITORY, private=True)
print(published.commit_url)
