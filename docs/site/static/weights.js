"use strict";
// The weights of a batch, by the equations of docs/mathematics.md: what try.js draws. The tests of the site hold every
// member against the float64 oracle, rgd.reference.
// `losses` is an array of finite numbers, never empty; a member's `weights` returns an array of the same length.

const members = (() => {
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const high = (values) => Math.max(...values);
  const low = (values) => Math.min(...values);
  const ones = (values) => values.map(() => 1);
  const overMean = (values) => {
    const divisor = mean(values);
    return values.map((value) => value / divisor);
  };
  const onLargest = (losses) => overMean(losses.map((loss) => (loss === high(losses) ? 1 : 0)));

  // Where an increasing function is 0, between two numbers.
  const root = (increasing, below, above) => {
    for (;;) {
      const middle = below + (above - below) / 2;
      if (middle <= below || middle >= above) return above;
      if (increasing(middle) < 0) below = middle;
      else above = middle;
    }
  };

  const tilt = (losses, scale, tau) => losses.map((loss) => Math.exp(scale * Math.min(loss, tau)));

  const normalisedTilt = (losses, scale, tau) => {
    const exponents = losses.map((loss) => scale * Math.min(loss, tau));
    return overMean(exponents.map((exponent) => Math.exp(exponent - high(exponents))));
  };

  const klBall = (losses, radius) => {
    if (radius === 0 || low(losses) === high(losses)) return ones(losses);
    const largest = onLargest(losses);
    if (radius >= Math.log(high(largest))) return largest;
    const weights = (beta) => normalisedTilt(losses, beta, Infinity);
    const divergence = (beta) => mean(weights(beta).map((w) => (w > 0 ? w * Math.log(w) : 0)));
    let above = 1 / (high(losses) - low(losses));
    while (divergence(above) < radius) above *= 2;
    return weights(root((beta) => divergence(beta) - radius, 0, above));
  };

  const midrangeKl = (losses, scale, relative) => {
    const half = (high(losses) - low(losses)) / 2;
    if (half === 0 || scale === 0) return ones(losses);
    const measured = losses.map((loss) => (loss - low(losses)) / (relative ? half : 1));
    return normalisedTilt(measured, scale, relative ? 1 : half);
  };

  const excess = (losses, eta) => losses.map((loss) => Math.max(loss - eta, 0));

  const chiSquare = (losses, gamma) => {
    const eta = root((eta) => gamma - mean(excess(losses, eta)), low(losses) - gamma, high(losses));
    return excess(losses, eta).map((value) => value / gamma);
  };

  const chiSquareBall = (losses, radius) => {
    if (radius === 0 || low(losses) === high(losses)) return ones(losses);
    const largest = onLargest(losses);
    if (radius >= (high(largest) - 1) / 2) return largest;
    const divergence = (eta) => mean(overMean(excess(losses, eta)).map((w) => (w - 1) ** 2)) / 2;
    const middle = mean(losses);
    const deviation = Math.sqrt(mean(losses.map((loss) => (loss - middle) ** 2)));
    const begin = Math.min(low(losses), middle - (2 * deviation) / Math.sqrt(2 * radius));
    const eta = root((eta) => (eta < high(losses) ? divergence(eta) : Infinity) - radius, begin, high(losses));
    return overMean(excess(losses, eta));
  };

  // How much of each sample lies in the worst share of the batch: 1, 0, or between, where ties are treated alike.
  const shareOfWorst = (losses, share) =>
    losses.map((loss) => {
      const worse = losses.filter((other) => other > loss).length;
      const ties = losses.filter((other) => other === loss).length;
      return Math.min(1, Math.max(0, (share * losses.length - worse) / ties));
    });

  const cvar = (losses, alpha, smoothing) => {
    if (alpha === 1) return ones(losses);
    if (smoothing === 0) return shareOfWorst(losses, alpha).map((part) => part / alpha);
    const weights = (eta) => losses.map((loss) => Math.min(1 / alpha, Math.exp((loss - eta) / smoothing)));
    return weights(root((eta) => 1 - mean(weights(eta)), low(losses) + smoothing * Math.log(alpha), high(losses)));
  };

  const trimmed = (losses, fraction, scale) => {
    const cut = shareOfWorst(losses, fraction);
    return tilt(losses, scale, Infinity).map((weight, i) => (1 - cut[i]) * weight);
  };

  const setting = (name, from, to, value, step = 0.05) => ({ name, from, to, value, step });
  return [
    {
      name: "KL, the dial",
      settings: [setting("scale", -2, 1, -0.7)],
      code: ({ scale }) => (scale > 0 ? `rgd.KL(math.inf, scale=${scale})` : `rgd.KL(scale=${scale})`),
      weights: (losses, { scale }) => tilt(losses, scale, Infinity),
      pointwise: true,
    },
    {
      name: "KL with a clip, the paper's",
      settings: [setting("tau", 0.1, 6, 1)],
      code: ({ tau }) => `rgd.KL(tau=${tau})`,
      weights: (losses, { tau }) => tilt(losses, 1 / (tau + 1), tau),
      pointwise: true,
    },
    {
      name: "KL, normalised",
      settings: [setting("tau", 0.1, 6, 3), setting("scale", -2, 2, 0.5)],
      code: ({ tau, scale }) => `rgd.KL(tau=${tau}, scale=${scale}, normalize=True)`,
      weights: (losses, { tau, scale }) => normalisedTilt(losses, scale, tau),
    },
    {
      name: "KLBall",
      settings: [setting("radius", 0, 2, 0.2)],
      code: ({ radius }) => `rgd.KLBall(${radius})`,
      weights: (losses, { radius }) => klBall(losses, radius),
    },
    {
      name: "MidrangeKL",
      settings: [setting("scale", -2, 2, 1)],
      code: ({ scale }) => `rgd.MidrangeKL(${scale})`,
      weights: (losses, { scale }) => midrangeKl(losses, scale, false),
    },
    {
      name: "MidrangeKL, in half ranges",
      settings: [setting("scale", -2, 2, 1)],
      code: ({ scale }) => `rgd.MidrangeKL(${scale}, relative=True)`,
      weights: (losses, { scale }) => midrangeKl(losses, scale, true),
    },
    {
      name: "ChiSquare",
      settings: [setting("gamma", 0.05, 4, 1)],
      code: ({ gamma }) => `rgd.ChiSquare(${gamma})`,
      weights: (losses, { gamma }) => chiSquare(losses, gamma),
    },
    {
      name: "ChiSquareBall",
      settings: [setting("radius", 0, 4, 0.5)],
      code: ({ radius }) => `rgd.ChiSquareBall(${radius})`,
      weights: (losses, { radius }) => chiSquareBall(losses, radius),
    },
    {
      name: "CVaR",
      settings: [setting("alpha", 0.05, 1, 0.3), setting("smoothing", 0, 2, 0)],
      code: ({ alpha, smoothing }) => `rgd.CVaR(${alpha}${smoothing ? `, smoothing=${smoothing}` : ""})`,
      weights: (losses, { alpha, smoothing }) => cvar(losses, alpha, smoothing),
    },
    {
      name: "Trimmed",
      settings: [setting("fraction", 0, 0.95, 0.2), setting("scale", -2, 1, -0.5)],
      code: ({ fraction, scale }) => `rgd.Trimmed(rgd.KL(math.inf, scale=${scale}), ${fraction})`,
      weights: (losses, { fraction, scale }) => trimmed(losses, fraction, scale),
    },
    {
      name: "Focal",
      settings: [setting("gamma", 0, 4, 2)],
      code: ({ gamma }) => `rgd.Focal(${gamma})`,
      weights: (losses, { gamma }) => losses.map((loss) => (1 - Math.exp(-loss)) ** gamma),
      pointwise: true,
    },
    {
      name: "Threshold",
      settings: [setting("max_loss", 0.1, 6, 2)],
      code: ({ max_loss }) => `rgd.Threshold(${max_loss})`,
      weights: (losses, { max_loss }) => losses.map((loss) => (loss <= max_loss ? 1 : 0)),
      pointwise: true,
    },
    { name: "ERM, plain training", settings: [], code: () => "rgd.ERM()", weights: ones, pointwise: true },
  ];
})();
