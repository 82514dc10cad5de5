"""Classifying images without labels: Self-Classifier and its siblings. Names are imported when they are first used."""
__version__ = "0.1.0"

import importlib

_MODULES = ('ablations', 'augment', 'cli', 'core', 'curation', 'data', 'dist', 'embed', 'errors', 'estimator', 'explorer', 'figures', 'gallery', 'hierarchy', 'hub', 'kernels', 'kmeans', 'lars',
            'loss', 'metrics', 'model', 'probe', 'profile', 'published', 'report', 'result', 'run', 'scan', 'sclre', 'search', 'sela', 'selfclassifier', 'shards', 'sorting', 'taxonomy', 'train', 'transfer')
_HOME = {
    'MultiCrop': 'augment', 'explore': 'explorer', 'curate': 'curation', 'ImageSet': 'data', 'load_images': 'data', 'embed_images': 'embed', 'SelfclassError': 'errors',
    'save_pretrained': 'hub', 'load_pretrained': 'hub', 'import_official': 'hub', 'LARS': 'lars', 'uniform_prior_loss': 'loss', 'multi_head_loss': 'loss',
    'SelfClassifier': 'estimator', 'estimate_n_clusters': 'estimator', 'auto_recipe': 'estimator',
    'fit_clusters': 'kmeans', 'load_clusters': 'kmeans', 'read_features': 'kmeans',
    'cluster_scores': 'metrics', 'internal_scores': 'metrics', 'launch': 'dist', 'ClusterNet': 'model', 'ClusterResult': 'result', 'load_result': 'result', 'result_of_run': 'result', 'write_labels': 'result', 'linear_probe': 'probe', 'knn_probe': 'probe', 'top_k': 'search',
    'fit_pca': 'search', 'fit_kmeans': 'search', 'superclasses': 'taxonomy', 'superclass_labels': 'taxonomy', 'with_superclasses': 'taxonomy', 'superclass_report': 'hierarchy', 'superclass_scores': 'hierarchy', 'score_tables': 'hierarchy',
    'linear_eval': 'transfer', 'conv_probes': 'transfer', 'semi_supervised': 'transfer', 'few_shot': 'transfer', 'score_predictions': 'metrics', 'compare': 'report', 'NeighbourQueue': 'selfclassifier', 'fit_selfclassifier': 'selfclassifier', 'fit_sela': 'sela', 'fit_scan': 'scan', 'fit_sclre': 'sclre', 'fit_crossentropy': 'sclre',
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f'selfclass.{_HOME[name]}'), name)
    if name in _MODULES:
        return importlib.import_module(f'selfclass.{name}')
    raise AttributeError(f"module 'selfclass' has no attribute '{name}'; it has {', '.join(__all__)}")


def __dir__():
    return sorted({*globals(), *_MODULES, *__all__})
