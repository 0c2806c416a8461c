"""Small CPU reproductions of the gradient-routing papers and of the baselines: what each claims in a model small enough to check by hand.

    tug_of_war         opposing targets on one feature: the drift and the fixed points, in closed form
    absorption         how much of a labelled feature the deployed block keeps, by optimizer
    leakage            SGTM's leakage estimator and the token weight of gradient routing
    split_autoencoder  digits 0-4 and 5-9 in two halves of one code
    two_languages      SGTM, gradient routing and filtering on two synthetic languages
    baseline_bandit    penalty, screening and advantage modification on a bandit with one hack action, or correct attempts beside it
    rebound_bandit     failed hack, honest solving, silent hack: what a cap on honest reward does to the order
    confession_bandit  a sealed confession becomes honest and the hack stays; what a leak of its reward changes
    disguise_bandit    a monitor in the reward and a disguise: blatant, obfuscated or honest, by penalty and KL
    tdga_bandit        trusted directions and their controls on a contextual bandit with one hack action

Each runs as `python -m grpo_routing.reproductions.<name>`. Nothing in training imports this room.
"""
